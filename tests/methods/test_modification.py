"""The protocol of a method of one's own, and what it is told when it breaks it."""

import pytest
import torch
from models import Net
from torch import nn

import tokengate
from tokengate.kernels import Factors
from tokengate.methods import registry


def test_a_method_of_ones_own(monkeypatch):
    """The documented protocol: a registered class is gated, trained and checked like LoRA."""
    monkeypatch.setattr(registry.METHODS, "kinds", dict(registry.METHODS.kinds))

    @tokengate.register("diagonal")
    class Diagonal(tokengate.Modification):
        def __init__(self, linear, *, scale=1.0):
            super().__init__(linear)
            self.scale = scale
            self.gain = self.new_parameter(self.out_features)

        def reset_parameters(self):
            torch.nn.init.zeros_(self.gain)

        def forward(self, x, w):
            return self.scale * self.gain.to(w.dtype) * w

    model, x = Net(), torch.randn(2, 3, 8)
    base = model(x)
    tokengate.patch(model, ["v_proj"], "diagonal", scale=2.0)
    assert torch.equal(model(x), base)
    layer = model.blocks[0].v_proj
    with torch.no_grad():
        layer.modification.gain.fill_(0.5)
        layer.gate.tau.fill_(0.1)
    out = layer(x)
    torch.testing.assert_close(out, 2 * torch.nn.functional.linear(x, layer.weight) + layer.bias)
    out.sum().backward()
    assert layer.modification.gain.grad.shape == (8,)
    with pytest.raises(
        tokengate.TokenGateError, match=r"unknown option 'rank' .* options are scale"
    ):
        tokengate.patch(Net(), ["v_proj"], Diagonal, rank=3)

    class Extended(Diagonal):
        def __init__(self, linear, *, more=0.0, **options):
            super().__init__(linear, **options)

    with pytest.raises(tokengate.TokenGateError, match="its options are more, scale"):
        tokengate.patch(Net(), ["v_proj"], Extended, rank=3)
    assert tokengate.patch(Net(), ["v_proj"], Extended, more=1.0, scale=3.0).blocks[0].v_proj

    with pytest.raises(tokengate.TokenGateError, match="method 'lora' is taken by LoRA"):
        tokengate.register("lora")(Diagonal)
    with pytest.raises(tokengate.TokenGateError, match="decorate a subclass"):
        tokengate.register("linear")(torch.nn.Linear)


def test_a_new_forward_is_not_hidden_by_inherited_factors():
    class Nothing(tokengate.methods.LoRA):
        def forward(self, x, w):
            return torch.zeros_like(w)

    class ForwardOnly:
        def forward(self, x, w):
            return torch.zeros_like(w)

    class Mixed(ForwardOnly, tokengate.methods.LoRA):
        pass

    class Again(Nothing):
        def factors(self, x, w, linear):
            return tokengate.methods.LoRA.factors(self, x, w, linear)

    x, changed = torch.randn(3, 4), []
    for method in (tokengate.methods.LoRA, Nothing, Mixed, Again):
        layer = nn.Linear(4, 4)
        base = layer(x)
        tokengate.patch(layer, "all-linear", method)
        with torch.no_grad():
            layer.modification.B.fill_(1.0)
        changed.append(not torch.equal(layer(x), base))
    assert changed == [True, False, False, True]


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda m, w: m[:, :1],
            r"gave a modification of shape \(3, 1\) for .* \(3, 4\)",
        ),
        (lambda m, w: m[0], r"gave a modification of shape \(4,\)"),
    ],
)
@pytest.mark.parametrize("gate", [True, False])
def test_a_modification_of_the_wrong_shape(give, message, gate):
    class Wrong(tokengate.methods.LoRA):
        def forward(self, x, w):
            return give(torch.zeros_like(w), w)

    layer = tokengate.patch(nn.Linear(4, 4), "all-linear", Wrong, gate=gate)
    with pytest.raises(tokengate.TokenGateError, match=message):
        layer(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": (1, 2)}, r"up of the factors has shape \(1, 2\) .* return \(4, 2\)"),
        ({"gain": (1,)}, r"gain of the factors has shape \(1,\) .* return \(4,\)"),
        ({"z": (1, 2)}, r"z of the factors has shape \(1, 2\) .* return \(3, 2\)"),
        ({"dtype": "float64"}, r"and dtype torch.float64: return .* in torch.float32"),
    ],
)
@pytest.mark.parametrize("gate", [True, False])
def test_factors_of_the_wrong_shape_or_dtype(change, message, gate):
    class Wrong(tokengate.methods.LoRA):
        def factors(self, x, w, linear):
            shapes = {"z": (len(x), 2), "up": (4, 2), "gain": (4,)} | change
            dtype = getattr(torch, shapes.pop("dtype", "float32"))
            return Factors(**{n: torch.ones(s, dtype=dtype) for n, s in shapes.items()})

    layer = tokengate.patch(nn.Linear(4, 4), "all-linear", Wrong, gate=gate)
    with pytest.raises(tokengate.TokenGateError, match=message):
        layer(torch.randn(3, 4))


@pytest.mark.parametrize("name", [3, "", None, tokengate.methods.LoRA])
def test_a_name_is_needed(name):
    with pytest.raises(tokengate.TokenGateError, match=r"register was given .* as a name"):
        tokengate.register(name)


def test_another_class_of_the_same_name_does_not_replace_the_built_in_one():
    class LoRA(tokengate.Modification):
        pass

    LoRA.__qualname__ = "LoRA"
    with pytest.raises(tokengate.TokenGateError, match="method 'lora' is taken by LoRA"):
        tokengate.register("lora")(LoRA)
    tokengate.register("lora")(tokengate.methods.LoRA)  # a module reloaded


@pytest.mark.parametrize("way", ["factors", "forward"])
def test_w_is_the_output_without_its_bias_where_its_values_are_asked_for(way):
    seen = []

    def factors(self, x, w, linear):
        seen.append(w)
        return tokengate.methods.LoRA.factors(self, x, w, linear)

    def forward(self, x, w):
        seen.append(w)
        return torch.zeros_like(w)

    Reads = type(
        "Reads", (tokengate.methods.LoRA,), {way: {"factors": factors, "forward": forward}[way]}
    )
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    tokengate.patch(layer, "all-linear", Reads)(x)
    wanted = nn.functional.linear(x, layer.weight)
    assert not torch.allclose(wanted, wanted + layer.bias)
    torch.testing.assert_close(*seen, wanted)
    assert Reads.reads_w
    assert not tokengate.methods.LoRA.reads_w
