"""save and load: what comes back is what was there, or an error that says what is wrong."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import tokengate
from tokengate import Slices, TokenGateError
from tokengate.adapters import folder as adapter_folder
from tokengate.errors import DifferentBaseWarning
from tokengate.methods import registry

METHODS = ["lora", "dora", "adalora", "adapter"]
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def trained(method="lora", model=None, targets=("q_proj", "fc1"), **options):
    """A patched model whose gates are partly open."""
    torch.manual_seed(3)
    model = model or Net()
    tokengate.patch(model, list(targets), method=method, penalty=0.25, **options)
    away_from_initialisation(model)
    for layer in tokengate.layers(model).values():
        if layer.gate is not None:
            layer.gate.tau.data.fill_(0.4)
    return model


def fresh():
    torch.manual_seed(3)
    return Net()


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit(folder, **changes):
    """Other fields in the configuration, ours or PEFT's."""
    (path,) = folder.glob("*_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    """Other tensors in adapter_model.safetensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refused(model, folder, *words, **options):
    """The one sentence that load answers, having touched nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # away from the saved values, which would not be seen to be loaded
    before = snapshot(model)
    with one_sentence(*words) as text:
        tokengate.load(model, folder, **options)
    assert snapshot(model) == before
    return text[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", [True, False])
def test_an_unpatched_model_becomes_the_saved_one(tmp_path, method, gate):
    model = trained(method, gate=gate, train=["head"], dropout=0.1)
    with torch.no_grad():
        model.head.weight.normal_()
    model.eval()
    tokengate.save(model, tmp_path / "adapter")
    other = fresh().eval()
    assert not torch.equal(other(X), model(X))
    assert tokengate.load(other, tmp_path / "adapter") == {}
    assert torch.equal(other(X), model(X))
    assert same(values(other), values(model))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    for name, layer in tokengate.layers(other).items():
        twin = tokengate.layers(model)[name]
        assert layer.modification.dropout == 0.1
        assert type(layer) is type(twin)
        assert (layer.gate is None) == (not gate)
        assert not gate or layer.gate.penalty == 0.25


@pytest.mark.parametrize("method", METHODS)
def test_a_patched_model_keeps_its_parameters_and_gets_the_values(tmp_path, method):
    tokengate.save(trained(method), tmp_path)
    model = fresh()
    tokengate.patch(model, ["q_proj", "fc1"], method=method, dropout=0.2)
    objects = {name: id(p) for name, p in model.named_parameters()}
    before = values(model)
    tokengate.load(model, tmp_path)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert not same(values(model), before)
    assert same(values(model), values(trained(method)))
    assert torch.equal(model.eval()(X), trained(method).eval()(X))
    # Its own dropout, which says nothing about the values.
    assert all(layer.modification.dropout == 0.2 for layer in tokengate.layers(model).values())


@pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(X).square().mean().backward()
        optimizer.step()
        return values(model)

    model = trained()
    tokengate.save(model, tmp_path)
    other = fresh()
    tokengate.load(other, tmp_path)
    before = values(other)
    after = step(other)
    assert not same(before, after)
    assert same(step(model), after)


def test_the_random_state_is_left_alone(tmp_path):
    tokengate.save(trained(), tmp_path)
    model = fresh()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tokengate.load(model, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_unpatch_gives_the_base_back(tmp_path):
    tokengate.save(trained(), tmp_path)
    model = fresh()
    before = snapshot(model)
    tokengate.load(model, tmp_path)
    assert snapshot(model) != before
    assert snapshot(tokengate.unpatch(model)) == before


def test_several_patches_and_slices(tmp_path):
    class Fused(Net):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return super().forward(x + q * k + v)

    def build():
        torch.manual_seed(0)
        return Fused()

    model = build()
    slices = {"qkv": Slices(groups=1, q=8, k=8, v=8)}
    tokengate.patch(model, ["qkv.q", "qkv.v"], slices=slices, rank={"qkv.q": 2, "*": 3})
    tokengate.patch(model, ["blocks.*.fc1"], method="dora", gate=False)
    tokengate.patch(model, ["q_proj"], method="adapter", activation="gelu", tau=0.1, penalty=0.5)
    away_from_initialisation(model)
    tokengate.save(model, tmp_path)
    other = build()
    tokengate.load(other, tmp_path)
    assert same(values(other), values(model))
    assert torch.equal(other(X), model(X))
    assert not torch.equal(other(X), build()(X))
    assert list(tokengate.layers(other)) == list(tokengate.layers(model))
    assert snapshot(tokengate.unpatch(other))["values"] == snapshot(build())["values"]


DIVISIONS = [Slices(q=4, k=4, v=4), Slices(groups=2, q=2, k=2, v=2)]


@pytest.mark.parametrize("part", ["q", "k"])
@pytest.mark.parametrize("name", [None, "other"])
def test_a_layer_that_is_divided_otherwise_is_refused(tmp_path, part, name):
    """Of the same shapes, so that only the order of the outputs tells."""
    models = [nn.Sequential(nn.Linear(8, 12)) for _ in DIVISIONS]
    for model, own, slices in zip(models, ["q", part], DIVISIONS, strict=True):
        tokengate.patch(model, [f"0.{own}"], slices={"0": slices})
        away_from_initialisation(model)
    tokengate.save(models[0], tmp_path)
    words = ["Slices(q=4"] if name or part == "q" else []
    refused(models[1], tmp_path, *words, name=name)
    assert tokengate.load(nn.Sequential(nn.Linear(8, 12)), tmp_path) == {}


def test_what_was_asked_is_on_record(tmp_path):
    import re

    model = Net()
    tokengate.patch(model, [re.compile(r"blocks\.0\..*fc1"), "v_proj"], exclude="blocks.1")
    tokengate.patch(model, lambda name, module: name.endswith("fc2"), train="head")
    optimizer_groups = tokengate.param_groups(model, lr=1e-3, s=5e-4)
    assert optimizer_groups
    tokengate.save(model, tmp_path)
    config = json.loads((tmp_path / "tokengate_config.json").read_text())
    assert config["targets"][0] == {
        "targets": [{"regex": r"blocks\.0\..*fc1"}, "v_proj"],
        "exclude": "blocks.1",
        "train": [],
    }
    assert "callable" in config["targets"][1]["targets"]
    assert list(config["layers"]) == [
        "blocks.0.v_proj",
        "blocks.0.fc1",
        "blocks.0.fc2",
        "blocks.1.fc2",
    ]
    assert config["train"] == ["head.bias", "head.weight"]
    assert config["layers"]["blocks.0.fc1"]["s"] == 5e-4
    assert config["layers"]["blocks.0.fc1"]["method"] == "lora"
    assert (config["format_version"], config["tokengate_version"]) == (1, tokengate.__version__)
    assert config["base_class"] == "models.Net"


def test_a_users_own_method(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.METHODS, "kinds", dict(registry.METHODS.kinds))

    class Nested(tokengate.Modification):
        """Parameters in a module of its own, and a constant."""

        def __init__(self, linear, *, scale=1.0):
            super().__init__(linear)
            self.scale = scale
            self.inner = nn.Linear(self.in_features, self.out_features, bias=False)
            self.register_buffer("shift", torch.zeros(self.out_features))

        def reset_parameters(self):
            nn.init.zeros_(self.inner.weight)

        def forward(self, x, w):
            return self.scale * self.inner(x) + self.shift

    model = trained(Nested, scale=0.5)
    tokengate.layers(model)["blocks.0.fc1"].modification.shift.fill_(0.3)
    with pytest.raises(TokenGateError, match=r"Nested.*register"):
        tokengate.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    tokengate.register("nested")(Nested)
    tokengate.save(model, tmp_path / "a")
    other = fresh()
    tokengate.load(other, tmp_path / "a")
    assert torch.equal(other(X), model(X))
    assert same(values(other), values(model))
    del registry.METHODS.kinds["nested"]
    refused(fresh(), tmp_path / "a", "unknown method 'nested'")


def test_options_that_json_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.METHODS, "kinds", dict(registry.METHODS.kinds))

    @tokengate.register("odd")
    class Odd(tokengate.methods.LoRA):
        def __init__(self, linear, *, shape=(1, 2), **options):
            super().__init__(linear, **options)

    model = Net()
    tokengate.patch(model, ["fc1"], method="odd", shape=(3, 4))
    with pytest.raises(TokenGateError, match=r"shape=\(3, 4\) in 'blocks.0.fc1'"):
        tokengate.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_base_may_be_loaded_after_the_adapter(tmp_path, method):
    model = trained(method, train=["head"]).eval()
    tokengate.save(model, tmp_path)
    with torch.device("meta"):
        other = Net().eval()
    tokengate.load(other, tmp_path)
    assert all(
        not parameter.is_meta
        for layer in tokengate.layers(other).values()
        for part in (layer.modification, layer.gate)
        for parameter in part.parameters()
    )
    assert other.blocks[0].fc1.weight.is_meta
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    base = {k: v for k, v in fresh().state_dict().items() if not k.startswith("head")}
    other.load_state_dict(base, strict=False, assign=True)
    assert torch.equal(other(X), model(X))
    assert not torch.equal(other(X), fresh()(X))


def test_a_model_patched_on_the_meta_device_gets_values(tmp_path):
    model = trained("dora")
    tokengate.save(model, tmp_path)
    with torch.device("meta"):
        other = tokengate.patch(Net(), ["q_proj", "fc1"], method="dora")
    with pytest.raises(TokenGateError, match="meta device"):
        tokengate.save(other, tmp_path / "b")
    tokengate.load(other, tmp_path)
    assert not any(p.is_meta for n, p in other.named_parameters() if "modification" in n)
    other.load_state_dict(fresh().state_dict(), strict=False, assign=True)
    assert torch.equal(other(X), model(X))


def test_a_16_bit_base_and_a_wider_one(tmp_path):
    model = trained("lora", fresh().bfloat16(), train=["head"])
    tokengate.save(model, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["head.weight"].dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        other = fresh().to(dtype)
        tokengate.load(other, tmp_path)
        loaded, saved = values(other), values(model)
        for key in saved:
            if "modification" in key or "gate" in key or "head" in key:
                assert torch.equal(loaded[key], saved[key].to(loaded[key].dtype))
        assert other.head.weight.dtype == dtype
    tokengate.save(other, tmp_path)  # now float64
    double = fresh().double()
    tokengate.load(double, tmp_path)
    assert same(values(double), values(other))
    text = refused(fresh(), tmp_path, "blocks.0.q_proj.modification.A", "float64", "float32")
    assert "[8, 8]" in text
    again = fresh().double()
    tokengate.load(again, tmp_path)
    assert same(values(again), values(other))


def test_saving_again_replaces(tmp_path):
    tokengate.save(trained("lora"), tmp_path)
    tokengate.save(trained("dora"), tmp_path)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert same(values(other), values(trained("dora")))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_model.safetensors",
        "tokengate_config.json",
    ]
    # As any file of this user's, not as a temporary one.
    mask = os.umask(0)
    os.umask(mask)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_killed_saves_left_is_taken_away_when_nobody_can_be_writing_it(tmp_path):
    tokengate.save(trained("lora"), tmp_path)
    names = [".adapter_model.safetensors.0123abcd.tmp", ".tokengate_config.json.0123abcd.tmp"]
    names += ["notes.tmp", ".other.tmp"]
    for hours in (0.9, 1.1):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "half").write_bytes(b"1")
            for path in (tmp_path / name / "half", tmp_path / name):
                os.utime(path, (time.time() - hours * 3600,) * 2)
        tokengate.save(trained("lora"), tmp_path)
        left = {path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"}
        assert left == set(names if hours < 1 else names[2:])
    # A large file may take long to write, in a folder that changed when it was begun.
    (tmp_path / names[0]).mkdir()
    (tmp_path / names[0] / "half").write_bytes(b"1")
    os.utime(tmp_path / names[0], (time.time() - 7200,) * 2)
    tokengate.save(trained("lora"), tmp_path)
    assert (tmp_path / names[0]).exists()


@pytest.mark.parametrize("moment", ["adapter_model.safetensors", "tokengate_config.json"])
@pytest.mark.parametrize("before", [True, False])
def test_a_save_within_a_save_leaves_one_of_the_two(tmp_path, monkeypatch, moment, before):
    """What another process does just before or after one of the two files is put in place."""
    tokengate.save(trained("lora"), tmp_path)
    put, others = os.replace, []

    def interrupted(source, target):
        if os.path.basename(target) != moment or others:
            return put(source, target)
        others.append(moment)
        if before:
            tokengate.save(trained("dora"), tmp_path)
        put(source, target)
        if not before:
            tokengate.save(trained("dora"), tmp_path)

    monkeypatch.setattr(os, "replace", interrupted)
    tokengate.save(trained("adapter"), tmp_path)
    assert others
    other = fresh()
    tokengate.load(other, tmp_path)
    last = "adapter" if before and moment == "adapter_model.safetensors" else "dora"
    assert same(values(other), values(trained(last)))


@pytest.mark.parametrize("step", ["_config_text", "open_weights", "_check_tensors"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_is_replaced_while_it_is_read_is_of_one_adapter(tmp_path, monkeypatch, step, method):
    def newer():
        model = trained(method)
        for layer in tokengate.layers(model).values():
            layer.gate.penalty = 0.5
            layer.modification.A.data.neg_()
        return model

    older = trained("lora")
    tokengate.save(older, tmp_path)
    read, times = getattr(adapter_folder, step), []

    def replaced(*args):
        times.append(step)
        if len(times) == 1:
            tokengate.save(newer(), tmp_path)
        return read(*args)

    monkeypatch.setattr(adapter_folder, step, replaced)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert times
    # The weights that were opened are read to their end, and the configuration is theirs.
    wanted, penalty = (older, 0.25) if step == "_check_tensors" else (newer(), 0.5)
    assert same(values(other), values(wanted))
    assert {layer.gate.penalty for layer in tokengate.layers(other).values()} == {penalty}


def test_a_folder_that_is_always_replaced_while_it_is_read_ends_in_an_error(tmp_path, monkeypatch):
    tokengate.save(trained(), tmp_path)
    with open(tmp_path / "adapter_model.safetensors", "r+b") as file:
        file.write(b"\0")
    read, times = adapter_folder._config_text, []

    def touched(folder):
        times.append(folder)
        os.utime(folder / "tokengate_config.json", ns=(0, 10**9 * len(times)))
        return read(folder)

    monkeypatch.setattr(adapter_folder, "_config_text", touched)
    refused(fresh(), tmp_path, "no safetensors file")
    assert 1 < len(times) <= 20


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    tokengate.save(trained("lora"), tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        tokengate.save(trained("dora"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_a_save_killed_between_its_two_files_is_the_new_one(tmp_path):
    tokengate.save(trained("lora"), tmp_path)
    old = (tmp_path / "tokengate_config.json").read_bytes()
    tokengate.save(trained("dora"), tmp_path)
    (tmp_path / "tokengate_config.json").write_bytes(old)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert same(values(other), values(trained("dora")))
    # Once more, over an interrupted one.
    tokengate.save(trained("adalora"), tmp_path)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert same(values(other), values(trained("adalora")))
    # What is not of the save before is no interruption.
    tokengate.save(trained("adapter"), tmp_path)
    (tmp_path / "tokengate_config.json").write_bytes(old)
    refused(fresh(), tmp_path, "lacks", "blocks.0.q_proj.modification.A")


def test_what_diverged_is_not_saved_over_what_had_not(tmp_path):
    model = trained()
    tokengate.save(model, tmp_path)
    with torch.no_grad():
        model.blocks[1].fc1.modification.B[0, 0] = float("nan")
    with pytest.raises(TokenGateError, match=r"not finite in 'blocks.1.fc1.modification.B'"):
        tokengate.save(model, tmp_path)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert same(values(other), values(trained()))


def test_save_and_load_refuse_what_they_cannot_do(tmp_path):
    with pytest.raises(TokenGateError, match="save was asked of a Net without a patched layer"):
        tokengate.save(Net(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenGateError, match="is a file"):
        tokengate.save(trained(), tmp_path / "file")
    refused(fresh(), tmp_path / "nowhere", "does not exist", "nowhere")
    refused(fresh(), tmp_path, "tokengate_config.json", "does not exist")
    tokengate.save(trained(), tmp_path)
    with pytest.raises(TokenGateError, match="load was given a int"):
        tokengate.load(3, tmp_path)
    model = fresh()
    with torch.inference_mode():
        refused(model, tmp_path, "load was called under torch.inference_mode")


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


def forge(folder, change):
    """Another configuration, with the digests and the metadata that fit it."""
    path, weights = folder / "tokengate_config.json", folder / "adapter_model.safetensors"
    config = json.loads(path.read_text())
    del config["sha256"]
    change(config)
    save_file(load_file(weights), weights, {"tokengate": json.dumps(config), "previous": ""})
    config["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    path.write_text(json.dumps(config))


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


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    """It is the whole process's, of which another thread may be making a file just then."""
    monkeypatch.setattr(os, "umask", None)
    tokengate.save(trained(), tmp_path)


# Imports torch once, and is forked for every kill. A child saves the one adapter over the other and
# says "here" and waits when it comes to its n-th operation on files, or, where n is negative, saves
# them in turns, and says so after -n saves without waiting.
SAVER = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
import torch
torch.set_num_threads(1)
from test_saving import trained
import tokengate
models = [trained("lora", rank=4), trained("dora", rank=8)]

def save(n):
    left = n
    def come_to(event, arguments):
        nonlocal left
        if event.partition(".")[0] not in ("open", "os", "shutil"):
            return
        if left == 0:
            print("here", flush=True)
            signal.pause()
        left -= 1
    if n >= 0:
        sys.addaudithook(come_to)
        tokengate.save(models[1], sys.argv[2])
        print("done", flush=True)
    while n < 0:
        for model in models:
            tokengate.save(model, sys.argv[2])
            n += 1
            if n == 0:
                print("here", flush=True)
            n = n or -(10**9)

for line in sys.stdin:
    child = os.fork()
    if not child:
        save(int(line))
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_killed_at_any_moment_the_folder_loads(tmp_path):
    folder = tmp_path / "adapter"
    first = trained("lora", rank=4)
    wanted = [values(first), values(trained("dora", rank=8))]
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])

    def found_after(server, n):
        """Which of the two is there, and whether files were left, of one killed at moment n."""
        tokengate.save(first, folder)
        server.stdin.write(f"{n}\n")
        server.stdin.flush()
        said = {server.stdout.readline().strip() for _ in range(2)}  # in either order
        (child,) = (int(each) for each in said if each.isdigit())
        if "done" in said:
            return None
        os.kill(child, signal.SIGKILL)
        other = fresh()
        tokengate.load(other, folder)
        found = [same(values(other), each) for each in wanted]
        names = {path.name for path in folder.iterdir()}
        left = {name for name in names if name.startswith(".")}
        assert names - left == {"tokengate_config.json", "adapter_model.safetensors", "README.md"}
        assert all(name.endswith(".tmp") for name in left)
        for name in left:
            shutil.rmtree(folder / name)
        return found.index(True), bool(left)

    with subprocess.Popen(
        [sys.executable, "-c", SAVER, paths, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        moments = []
        while (found := found_after(server, len(moments))) is not None:
            moments.append(found)
        for saves in range(1, 13):  # in the middle of whatever comes next
            assert found_after(server, -saves) is not None
        server.stdin.close()
    # The old one up to a moment and the new one from it on, with files half made before it.
    kept = [index for index, _ in moments]
    assert kept == sorted(kept)
    assert {*kept} == {0, 1}
    assert {(0, True), (0, False)} <= {*moments}
    assert len(moments) > 10


def test_what_zero_has_divided_is_not_loaded_into(tmp_path):
    model = trained()
    tokengate.save(model, tmp_path)
    parameter = tokengate.layers(model)["blocks.0.q_proj"].modification.A
    parameter.ds_id, parameter.data = 0, torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(TokenGateError, match=r"'blocks.0.q_proj' divided by DeepSpeed's ZeRO-3"):
        tokengate.load(model, tmp_path)


def test_what_zero_has_divided_is_gathered_to_be_saved(tmp_path, monkeypatch):
    model = trained()
    expected = values(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = {id(p): p.detach().clone() for p in parameters}

    def gather(param_list):
        for p in param_list:
            p.data = kept[id(p)]

    def divide(param_list):
        for p in param_list:
            p.data = torch.empty(0)

    for number, p in enumerate(parameters):
        p.ds_id, p.all_gather, p.partition = number, gather, divide
    divide(parameters)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    tokengate.save(model, tmp_path)
    assert all(p.numel() == 0 for p in parameters), "as it was before"
    gather(parameters)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert same(values(other), expected)
