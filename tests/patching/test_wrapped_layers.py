"""A small module around one layer stands for it: patched inside, and what is around it stays."""

import re
import warnings

import pytest
import torch
from torch import nn

import tokengate
from tokengate.errors import SkippedModuleWarning


class Clipped(nn.Module):
    """As Gemma 4's: the inputs and outputs of one linear layer, clamped by buffers."""

    def __init__(self, limit=0.5):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("limit", torch.tensor(limit))

    def forward(self, x):
        return self.linear(x.clamp(-1, 1)).clamp(-self.limit, self.limit)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"q_proj": Clipped(), "k_proj": nn.Linear(4, 4)})
        self.b = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "mlp": nn.Sequential(nn.Linear(4, 4))})
        self.c = nn.ModuleDict({"q_proj": nn.Embedding(5, 4), "norm": nn.LayerNorm(4)})
        self.two = nn.ModuleDict({"o_proj": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})

    def forward(self, x):
        return self.b["mlp"](self.b["q_proj"](self.a["k_proj"](self.a["q_proj"](x))))


def said_by(targets, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tokengate.patch(Net(), targets, **options)
    messages = [str(w.message) for w in caught if w.category is SkippedModuleWarning]
    assert all(w.filename == __file__ for w in caught)
    assert len(messages) <= 1, "one warning for a call of patch"
    return list(tokengate.layers(model)), messages


@pytest.mark.parametrize(
    ("targets", "layers", "said"),
    [
        (["q_proj"], ["a.q_proj.linear", "b.q_proj"], ["a.q_proj", "a.q_proj.linear", "c.q_proj"]),
        (["a.q_proj"], ["a.q_proj.linear"], ["a.q_proj", "a.q_proj.linear"]),
        (["a.*"], ["a.q_proj.linear", "a.k_proj"], []),  # which means the layer itself, too
        (["a.?_proj"], ["a.q_proj.linear", "a.k_proj"], ["a.q_proj", "a.q_proj.linear"]),
        ([re.compile(r"a\.q_proj")], ["a.q_proj.linear"], ["a.q_proj", "a.q_proj.linear"]),
        (lambda n, m: isinstance(m, Clipped), ["a.q_proj.linear"], ["a.q_proj", "a.q_proj.linear"]),
        (["mlp"], ["b.mlp.0"], ["b.mlp", "b.mlp.0"]),
        (["linear"], ["a.q_proj.linear"], []),
        ("all-linear", None, []),
    ],
)  # fmt: skip
def test_it_stands_for_its_layer_and_that_is_said(targets, layers, said):
    found, messages = said_by(targets)
    if layers is not None:
        assert found == layers
    assert bool(messages) == bool(said)
    for name in said:
        assert f"'{name}'" in messages[0]


def test_one_warning_for_all_targets():
    layers, messages = said_by(["q_proj", "k_proj", "mlp"])
    assert layers == ["a.q_proj.linear", "a.k_proj", "b.q_proj", "b.mlp.0"]
    (message,) = messages
    assert "'c.q_proj' (Embedding), which cannot be patched and stay" in message
    assert "'a.q_proj' (Clipped), 'b.mlp' (Sequential), each around one linear layer" in message
    assert message.endswith("train=.")


def test_what_is_excluded_is_not_entered():
    layers, messages = said_by(["q_proj"], exclude=["linear", "c.q_proj"])
    assert layers == ["b.q_proj"]
    assert not messages
    with pytest.raises(tokengate.TokenGateError, match="only what exclude= leaves out"):
        tokengate.patch(Net(), ["a.q_proj"], exclude=["a.q_proj.linear"])


def test_what_is_around_two_layers_is_named_with_the_way_in():
    with pytest.raises(tokengate.TokenGateError, match=r"a Sequential.*name those inside it.*'0'"):
        tokengate.patch(Net(), ["o_proj"])


@pytest.mark.filterwarnings("ignore::tokengate.errors.SkippedModuleWarning")
def test_what_is_around_it_stays_in_force():
    model, x = Net(), torch.randn(3, 5, 4)
    base = model(x)
    tokengate.patch(model, ["a.q_proj"], rank=2)
    assert torch.equal(model(x), base)
    with torch.no_grad():
        model.a["q_proj"].linear.modification.B.fill_(5.0)
    changed = model.a["q_proj"](x)
    assert changed.abs().max() == 0.5
    assert not torch.equal(model(x), base)
    with pytest.raises(tokengate.TokenGateError, match="patched already"):
        tokengate.patch(model, ["a.q_proj"])
    tokengate.unpatch(model)
    assert torch.equal(model(x), base)


def test_gemma_4s_clippable_linear():
    transformers = pytest.importorskip("transformers", reason="the transformers extra is missing")
    modeling = pytest.importorskip(
        "transformers.models.gemma4.modeling_gemma4", reason="this transformers has no Gemma 4"
    )
    config = transformers.Gemma4VisionConfig(use_clipped_linears=True)
    model = nn.ModuleDict({"q_proj": modeling.Gemma4ClippableLinear(config, 8, 8)})
    with torch.no_grad():
        model["q_proj"].output_max.fill_(0.1)
    x = torch.randn(2, 3, 8)
    base = model["q_proj"](x)
    with pytest.warns(SkippedModuleWarning, match=r"'q_proj' \(Gemma4ClippableLinear\), each"):
        tokengate.patch(model, ["q_proj"])
    assert list(tokengate.layers(model)) == ["q_proj.linear"]
    assert torch.equal(model["q_proj"](x), base)
    with torch.no_grad():
        model["q_proj"].linear.modification.B.fill_(9.0)
    assert model["q_proj"](x).max().item() == pytest.approx(0.1)
