"""A folder that is damaged or forged, or does not fit the model, is named, and nothing changes."""

import json
import os

import pytest
import torch
from saved_adapters import edit, forge, fresh, refused, rewrite, same, trained
from torch import nn

import tokengate
from tokengate.errors import DifferentBaseWarning

KEY, SHAPE = "blocks.0.fc1.modification.A", "[8, 8]"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("patched", [True, False])
def test_a_damaged_folder_is_named(tmp_path, strict, patched):
    def folder(name):
        tokengate.save(trained(), tmp_path / name)
        return tmp_path / name

    def model():
        return trained() if patched else fresh()

    def check(name, change, *words):
        place = folder(name)
        change(place)
        refused(model(), place, *words, strict=strict)

    def tensors(change):
        return lambda place: rewrite(place, change)

    weights, config = "adapter_model.safetensors", "tokengate_config.json"
    check("a", lambda f: (f / weights).unlink(), weights, "does not exist")
    check("b", lambda f: (f / config).unlink(), config, "does not exist")
    check("c", tensors(lambda t: t.pop(KEY)), "lacks", KEY, SHAPE)
    check("d", tensors(lambda t: t.update(new=torch.zeros(2, 7))), "'new'", "[2, 7]")
    check("e", tensors(lambda t: t.update({KEY: torch.zeros(4, 9)})), KEY, "[4, 9]", SHAPE)
    check("f", tensors(lambda t: t.update({KEY: t[KEY].half()})), KEY, SHAPE, "F16", "F32")
    check("g", tensors(lambda t: t[KEY].fill_(torch.nan)), KEY, SHAPE, "not finite")
    check("h", tensors(lambda t: t[KEY].fill_(torch.inf)), KEY, SHAPE, "not finite")
    check("i", tensors(lambda t: t[KEY].add_(1)), weights, "changed")
    check("j", lambda f: os.truncate(f / weights, 300), weights, "no safetensors file")
    check("k", lambda f: os.truncate(f / weights, 0), weights, "no safetensors file")
    huge = (1 << 62).to_bytes(8, "little")
    check("l", lambda f: (f / weights).write_bytes(huge + b"{}"), weights, "no safetensors file")
    check("m", lambda f: (f / config).write_text("{"), config, "no JSON")
    check("n", lambda f: (f / config).write_text("[" * 10**5), config, "no JSON")
    check("o", lambda f: (f / config).write_text("3"), config, "instead of an object")
    check("p", lambda f: (f / config).write_bytes(b"\xff\xfe"), config, "could not be read")
    check("q", lambda f: edit(f, format="peft"), config, "format")
    check("r", lambda f: edit(f, format_version=7), config, "format_version 7")
    check("s", lambda f: edit(f, extra=1), config, "unknown field 'extra'")
    check("t", lambda f: edit(f, base_class=3), config, "3 for base_class")
    check("u", lambda f: edit(f, train=["head.weight"]), config, "changed in 'train'")
    check("v", lambda f: edit(f, targets=[]), config, "changed in 'targets'")
    check("w", lambda f: edit(f, sha256="0" * 64), weights, "changed")
    check("x", lambda f: (f / weights).write_bytes((f / config).read_bytes()), weights)
    peft = '{"peft_type": "LORA", "r": 8}'
    check("y", lambda f: (f / config).write_text(peft), "PEFT")


def test_a_field_of_the_configuration_may_not_be_missing(tmp_path):
    tokengate.save(trained(), tmp_path)
    path = tmp_path / "tokengate_config.json"
    whole = json.loads(path.read_text())
    for key in whole:
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        refused(fresh(), tmp_path)
    path.write_text(json.dumps(whole))
    tokengate.load(fresh(), tmp_path)


def test_a_model_that_does_not_fit_is_named(tmp_path):
    tokengate.save(trained(train=["head"]), tmp_path)

    def changed(change):
        model = fresh()
        change(model)
        return model

    def narrow(model):
        model.blocks[1].fc1 = nn.Linear(8, 12)

    def without(model):
        del model.blocks[1]

    def wide_head(model):
        model.head = nn.Linear(8, 4)

    def norm(model):
        model.blocks[0].q_proj = nn.LayerNorm(8)

    refused(changed(narrow), tmp_path, "'blocks.1.fc1'", "(8, 16)", "(8, 12)")
    refused(changed(without), tmp_path, "'blocks.1.q_proj'", "not in the model", "blocks.0.q_proj")
    refused(changed(wide_head), tmp_path, "'head.", "[3", "[4")
    refused(changed(norm), tmp_path, "'blocks.0.q_proj'", "LayerNorm")

    def patched(*args, **options):
        return tokengate.patch(fresh(), *args, train=["head"], **options)

    both = ["q_proj", "fc1"]
    refused(patched(["q_proj"]), tmp_path, "'blocks.0.fc1'", "not patched")
    refused(patched([*both, "fc2"]), tmp_path, "fc2'", "not in the adapter")
    refused(patched(both, "dora"), tmp_path, "'blocks.0.q_proj'", "'lora'", "'dora'")
    refused(patched(both, rank=4), tmp_path, "rank=8 in the adapter and rank=4 in the model")
    refused(patched(both, scale=2.0), tmp_path, "scale=None in the adapter and scale=2.0")
    refused(patched(both, gate=False), tmp_path, "gate")
    refused(tokengate.patch(fresh(), both), tmp_path, "'head.bias'", "not by the model's patch")


def test_not_strict_reports_what_it_skipped(tmp_path):
    tokengate.save(trained(train=["head"]), tmp_path)
    model = fresh()
    model.blocks[1].fc1 = nn.Linear(8, 12)
    model.blocks[1].fc2 = nn.Linear(12, 8)
    model.head = nn.Linear(8, 4)
    with pytest.warns(DifferentBaseWarning, match="models.Net"):
        skipped = tokengate.load(model, tmp_path, strict=False)
    assert set(skipped) == {"blocks.1.fc1", "head.weight", "head.bias"}
    assert "(8, 12)" in skipped["blocks.1.fc1"]
    assert list(tokengate.layers(model)) == ["blocks.0.q_proj", "blocks.0.fc1", "blocks.1.q_proj"]
    for name, layer in tokengate.layers(model).items():
        twin = tokengate.layers(trained())[name]
        assert same(layer.modification.state_dict(), twin.modification.state_dict())
    refused(nn.Sequential(nn.Linear(2, 2)), tmp_path, "nothing of the adapter", strict=False)


def test_another_base_is_said(tmp_path):
    tokengate.save(trained(), tmp_path)
    model = fresh()
    model.blocks[1].v_proj = nn.Linear(8, 8, bias=False)
    tokengate.load(model, tmp_path)  # the same linear layers
    model = fresh()
    model.extra = nn.Linear(2, 2)
    with pytest.warns(DifferentBaseWarning, match="linear layers are not all those"):
        tokengate.load(model, tmp_path)


def test_a_claim_of_any_size_costs_no_memory(tmp_path):
    tokengate.save(trained(), tmp_path)
    forge(tmp_path, lambda c: c["layers"]["blocks.0.fc1"]["options"].update(rank=10**13))
    refused(fresh(), tmp_path, KEY, SHAPE, "10000000000000")
    refused(trained(), tmp_path, "rank=10000000000000")


@pytest.mark.parametrize("options", [{"rank": 8.0}, {"rank": True}, {"dropout": 5}, {"scale": "1"}])
def test_forged_options_are_refused(tmp_path, options):
    """Also those that equal the model's own."""
    rank = int(options.get("rank", 8))
    tokengate.save(trained(rank=rank), tmp_path)
    forge(tmp_path, lambda c: c["layers"]["blocks.1.fc1"]["options"].update(options))
    [(name, value)] = options.items()
    for model in (fresh(), trained(rank=rank)):
        refused(model, tmp_path, f"{name}={value!r}", "'blocks.1.fc1'", str(tmp_path))


@pytest.mark.parametrize("s", [-1e-4, 1e300])
def test_a_forged_slope_is_refused(tmp_path, s):
    tokengate.save(trained(), tmp_path)
    forge(tmp_path, lambda c: c["layers"]["blocks.1.fc1"].update(s=s))
    for model in (fresh(), trained()):
        refused(model, tmp_path, "the s of 'blocks.1.fc1'")


@pytest.mark.parametrize("slices", [{"self": 8}, {"groups": 8}, {"q": 0}, {"q.k": 8}, {}])
def test_forged_slices_are_refused(tmp_path, slices):
    tokengate.save(trained(), tmp_path)
    forge(tmp_path, lambda c: c["layers"]["blocks.1.fc1"].update(slices=slices))
    for model in (fresh(), trained()):
        refused(model, tmp_path)


@pytest.mark.parametrize("penalty", [-1.0, 1e300])
def test_a_forged_penalty_is_refused_before_values_change(tmp_path, penalty):
    tokengate.save(trained(), tmp_path)
    forge(tmp_path, lambda c: c["layers"]["blocks.1.fc1"].update(penalty=penalty))
    other = tokengate.patch(fresh(), ["q_proj", "fc1"])
    for model in (fresh(), other):
        refused(model, tmp_path, "the penalty of 'blocks.1.fc1'")


def test_forged_names_of_trained_parameters_are_refused(tmp_path):
    tokengate.save(trained(train=["head"]), tmp_path)
    forge(tmp_path, lambda c: c.update(train=[["head"]]))
    refused(fresh(), tmp_path, "for train")
