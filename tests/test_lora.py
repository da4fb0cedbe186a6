"""LoRA in a gated layer, against the loop, away from initialisation."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import tokengate


def layer_of(k, d, bias, dtype, gate=True, seed=0, **options):
    """A patched linear layer with random values everywhere."""
    torch.manual_seed(seed)
    layer = nn.Linear(k, d, bias=bias).to(dtype)
    tokengate.patch(layer, "all-linear", "lora", gate=gate, **options)
    with torch.no_grad():
        for parameter in layer.modification.parameters():
            parameter.normal_(std=0.6)
    return layer


def expect(layer, x, grad):
    """The reference's answer for a layer and its input."""
    numbers = {
        name: p.detach().double().numpy() for name, p in layer.named_parameters() if p.dim() > 0
    }
    flat_x, flat_grad = (t.detach().double().reshape(-1, t.shape[-1]).numpy() for t in (x, grad))
    return reference.lora_layer(
        flat_x,
        numbers["weight"],
        numbers.get("bias"),
        numbers["modification.A"],
        numbers["modification.B"],
        layer.modification.scale,
        None if layer.gate is None else float(numbers["gate.tau"][0]),
        0.0 if layer.gate is None else layer.gate.penalty,
        flat_grad,
    )


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from([(), (6,), (2, 5), (2, 3, 2), (0,)]),
    k=st.integers(1, 6),
    d=st.integers(1, 6),
    rank=st.integers(1, 8),
    bias=st.booleans(),
    gate=st.booleans(),
    scale=st.sampled_from([0.3, 1.0, 2.0]),
    tau=st.sampled_from([-1.0, 0.0, 0.3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(shape, k, d, rank, bias, gate, scale, tau, dtype, seed):
    options = {"rank": rank, "scale": scale, "tau": tau, "penalty": 0.01}
    layer = layer_of(k, d, bias, dtype, gate, seed, **options)
    x = torch.randn(*shape, k).to(dtype).requires_grad_()
    grad = torch.randn(*shape, d).to(dtype)
    wanted = expect(layer, x, grad)
    if gate and tau > 0:  # where the dtype's rounding could decide S, there is nothing to compare
        layer64, x64 = layer.double(), x.detach().double()
        w = nn.functional.linear(x64, layer64.weight)
        ratio = layer64.modification(x64, w).norm(dim=-1) / w.norm(dim=-1)
        layer.to(dtype)
        margin = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
        cancels = bias and dtype == torch.bfloat16 and bool((w.norm(dim=-1) < 0.5).any())
        assume(not cancels and bool(((ratio / tau - 1).abs() > margin).all()))
    with tokengate.record(layer, positions=True) as rec:
        h = layer(x)
    h.backward(grad)
    assert rec.positions[""][0].flatten().tolist() == wanted["S"]
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.15}[dtype]

    def check(got, expected):
        expected = torch.as_tensor(expected, dtype=torch.float64).reshape(got.shape)
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * size)

    check(h.detach(), wanted["h"])
    check(x.grad, wanted["x"])
    check(layer.modification.A.grad, wanted["A"])
    check(layer.modification.B.grad, wanted["B"])
    if gate:
        # g adds terms whose sign is decided by mu: compare where rounding cannot flip one.
        if dtype == torch.float64:
            check(layer.gate.tau.grad, wanted["tau"])
        assert layer.gate.tau.grad.dtype == layer.gate.tau.dtype
    assert layer.weight.grad is None


def test_the_reference_differs_where_it_should():
    layer = layer_of(4, 3, True, torch.float64, tau=2.0)
    x, grad = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    mixed = expect(layer, x, grad)
    assert 0 < sum(mixed["S"]) < 9
    with torch.no_grad():
        layer.gate.tau.fill_(0.0)
    assert not np.allclose(mixed["h"], expect(layer, x, grad)["h"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_no_op_at_initialisation_bit_for_bit(dtype, bias):
    layer = nn.Linear(16, 24, bias=bias).to(dtype)
    x = torch.randn(5, 7, 16).to(dtype)
    base = layer(x)
    tokengate.patch(layer, "all-linear", rank=4)
    assert torch.equal(layer(x), base)
    with torch.no_grad():
        layer.modification.B.fill_(0.1)
    assert not torch.equal(layer(x), base)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_open_is_ungated_and_all_closed_is_base(dtype, bias):
    gated = layer_of(8, 8, bias, dtype, tau=-1.0)
    plain = layer_of(8, 8, bias, dtype, gate=False)
    x = torch.randn(3, 5, 8).to(dtype)
    with tokengate.disabled(gated):
        base = gated(x)
    assert not torch.equal(gated(x), base)
    assert torch.equal(gated(x), plain(x))
    with torch.no_grad():
        gated.gate.tau.fill_(1e9)
    assert torch.equal(gated(x), base)


def test_permuting_tokens_permutes_outputs_and_a_row_stands_alone():
    layer = layer_of(8, 6, True, torch.float64, tau=0.8)
    x = torch.randn(4, 9, 8, dtype=torch.float64)
    order = torch.randperm(9)
    h = layer(x)
    assert not torch.allclose(h[:, order], h)
    torch.testing.assert_close(layer(x[:, order]), h[:, order])
    torch.testing.assert_close(layer(x[2]), h[2])
    torch.testing.assert_close(layer(x[2, 3]), h[2, 3])


def test_dropout_acts_in_training_only_and_only_on_the_low_rank_path():
    layer = layer_of(64, 8, True, torch.float32, gate=False, dropout=0.5)
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.modification.B.zero_()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer = layer_of(64, 8, True, torch.float32, gate=False, dropout=0.5).eval()
    assert torch.equal(layer(x), layer(x))


def test_initial_values_and_scale():
    layer = nn.Linear(400, 10)
    tokengate.patch(layer, "all-linear", rank=100, alpha=20)
    assert layer.modification.scale == pytest.approx(0.2)
    assert layer.modification.A.shape == (100, 400)
    assert layer.modification.B.shape == (10, 100)
    # kaiming-uniform with a = sqrt 5 is uniform in +-1/sqrt(k)
    assert layer.modification.A.abs().max().item() == pytest.approx(1 / 20, rel=1e-3)
    assert layer.modification.A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert not layer.modification.B.any()
    assert tokengate.patch(nn.Linear(3, 3), "all-linear").modification.scale == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank=-1 is not a whole number >= 1"),
        ({"rank": 0}, "rank=0 is not"),
        ({"rank": 2.5}, "rank=2.5 is not"),
        ({"rank": True}, "rank=True is not"),
        ({"scale": math.nan}, "scale=nan is not a finite number"),
        ({"scale": 0.0}, "scale=0.0 is not above 0"),
        ({"alpha": math.inf}, "alpha=inf is not a finite number"),
        ({"scale": 1.0, "alpha": 8}, "scale=1.0 and alpha=8 were both given"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1 is not in"),
        ({"rnak": 8}, "unknown option 'rnak' .* rank, scale, alpha, dropout"),
        ({"tau": math.nan}, "tau=nan is not a finite number"),
        ({"penalty": -1e-5}, "penalty=-1e-05 is negative"),
        ({"penalty": math.inf}, "penalty=inf is not a finite number"),
    ],
)
def test_bad_options(options, message):
    layer = nn.Linear(3, 3)
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.patch(layer, "all-linear", "lora", **options)
    assert type(layer) is nn.Linear
