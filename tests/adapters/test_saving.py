"""save and load: what comes back is what was there, or an error that says what is wrong."""

import copy
import importlib.metadata
import json
import os
import pickle

import numpy as np
import pytest
import torch
from models import Net, away_from_initialisation, one_sentence, snapshot
from safetensors.torch import load_file
from saved_adapters import X, fresh, refused, same, trained, values
from torch import nn

import tokengate
from tokengate import Slices, TokenGateError
from tokengate.errors import DifferentBaseWarning
from tokengate.gates.registry import options_of
from tokengate.methods import registry

METHODS = ["lora", "dora", "adalora", "adapter"]


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
@pytest.mark.parametrize("given", [{}, {"alpha": 16}, {"rslora": True, "alpha": 16}])
def test_a_scale_that_was_set_since_is_saved(tmp_path, method, given):
    """As who weakens what is trained sets it; the printed layer and its forward have that one."""
    if given.keys() - options_of(registry.METHODS.find(method)).keys():
        pytest.skip("is no option of it")
    model = trained(method, **given).eval()
    before = model(X)
    for layer in tokengate.layers(model).values():
        layer.modification.scale *= 0.5
    assert not torch.equal(model(X), before)
    tokengate.save(model, tmp_path)
    other = fresh().eval()
    tokengate.load(other, tmp_path)
    assert torch.equal(other(X), model(X))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tokengate.load(twin, tmp_path)  # patched in the same way
    with pytest.raises(TokenGateError, match=r"has (alpha|scale)="):
        tokengate.load(trained(method, **given), tmp_path)


@pytest.mark.parametrize("scale", [np.float32(0.25), torch.tensor(0.25)], ids=["numpy", "tensor"])
def test_a_scale_of_any_kind_is_saved(tmp_path, scale):
    model = trained("lora").eval()
    for layer in tokengate.layers(model).values():
        layer.modification.scale = scale
    tokengate.save(model, tmp_path)
    other = fresh().eval()
    tokengate.load(other, tmp_path)
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0, -0.5])
def test_a_scale_that_takes_back_what_was_trained_is_saved(tmp_path, method, scale):
    model = trained(method).eval()
    before = model(X)
    tokengate.layers(model)["blocks.0.q_proj"].modification.scale = scale
    assert not torch.equal(model(X), before)
    tokengate.save(model, tmp_path)
    other = fresh().eval()
    tokengate.load(other, tmp_path)
    assert torch.equal(other(X), model(X))


def test_a_dropout_and_an_activation_that_were_set_since_are_saved(tmp_path):
    model = trained("adapter", activation="ReLU", dropout=0.1)
    for layer in tokengate.layers(model).values():
        layer.modification.dropout = 0.4
        layer.modification.activation = "gelu"
    tokengate.save(model, tmp_path)
    other = fresh()
    tokengate.load(other, tmp_path)
    for layer in tokengate.layers(other).values():
        assert (layer.modification.dropout, layer.modification.activation) == (0.4, "gelu")
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_what_load_would_refuse_is_not_written(tmp_path):
    tokengate.save(model := trained("lora"), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    modification = tokengate.layers(model)["blocks.0.q_proj"].modification
    modification.dropout = 1.0
    with one_sentence("save found options of 'blocks.0.q_proj' that 'lora' refuses", "dropout=1.0"):
        tokengate.save(model, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    modification.dropout = 0.0
    tokengate.save(model, tmp_path)


def test_a_scale_in_another_unit_than_its_option_is_the_methods_own():
    class Shared(tokengate.Modification):
        def __init__(self, linear, *, scale=1.0, rank=4):
            super().__init__(linear)
            self.scale = scale / rank
            self.b = self.new_parameter(1)

        def reset_parameters(self):
            torch.nn.init.zeros_(self.b)

        def forward(self, x, w):
            return self.scale * self.b * w

    model = tokengate.patch(fresh(), ["q_proj"], Shared, scale=0.5)
    for layer in tokengate.layers(model).values():
        layer.modification.scale *= 0.5
        assert layer.modification.options == {"scale": 0.5}


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


def test_a_package_that_was_never_installed_saves_what_it_has_trained(tmp_path, monkeypatch):
    """As from a path, or frozen into a program, where it has no metadata."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", absent)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("tokengate")
    model = tokengate.patch(Net(), ["q_proj"], rank=2)
    with tokengate.record(model) as rec:
        model(torch.randn(2, 3, 8))
    tokengate.save(model, tmp_path, report=rec.report())
    assert tokengate.load(Net(), tmp_path) == {}


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
    says = "import what registers it, by @tokengate.register('nested')"
    refused(fresh(), tmp_path / "a", "made with method 'nested'", says)


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


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    """It is the whole process's, of which another thread may be making a file just then."""
    monkeypatch.setattr(os, "umask", None)
    tokengate.save(trained(), tmp_path)


# Imports torch once, and is forked for every kill. A child saves the one adapter over the other and


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


def test_running_means_that_training_moved_are_told_of(tmp_path):
    """No adapter has them, and outputs in a fresh base were others without a word."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    x = torch.randn(16, 8)
    model = away_from_initialisation(tokengate.patch(base(), "all-linear", rank=2))
    model.eval()(x)
    tokengate.save(model, tmp_path)
    same = base().eval()
    tokengate.load(same, tmp_path)  # a warning would be an error
    torch.testing.assert_close(same(x), model(x))
    model.train()(x)
    wanted = model.eval()(x)
    tokengate.save(model, tmp_path)
    other = base().eval()
    with pytest.warns(DifferentBaseWarning, match=r"'1\.running_mean'.*state_dict"):
        tokengate.load(other, tmp_path)
    assert not torch.allclose(other(x), wanted)
    statistics = {n: v for n, v in model.state_dict().items() if n.startswith("1.")}
    again = base().eval()
    again.load_state_dict(statistics, strict=False)  # what the warning says
    tokengate.load(again, tmp_path)
    torch.testing.assert_close(again(x), wanted)
