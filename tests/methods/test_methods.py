"""Every method in a gated layer, against the loop, away from initialisation."""

import copy
import functools
import pickle
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from drawing import many
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import away_from_initialisation
from torch import nn
from torch.nn import functional as F

import tokengate
from tokengate.gates.positions import Positions
from tokengate.kernels.change import Change
from tokengate.kernels.dropped_linear import dropped_linear
from tokengate.methods import base

METHODS = ["lora", "dora", "adalora", "adapter"]
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def layer_of(k, d, bias, dtype, method="lora", gate=True, seed=0, **options):
    """A patched linear layer with random values everywhere."""
    torch.manual_seed(seed)
    layer = nn.Linear(k, d, bias=bias).to(dtype)
    tokengate.patch(layer, "all-linear", method, gate=gate, **options)
    away_from_initialisation(layer, 0.6)
    if method == "dora":  # a length, around that of W0's rows
        with torch.no_grad():
            norms = layer.weight.to(layer.modification.magnitude.dtype).norm(dim=1)
            layer.modification.magnitude.mul_(0.5).add_(norms)
    return layer


def expect(layer, x, grad, mask=None):
    """The reference's answer for a layer and its input."""
    modification = layer.modification
    values = {n: p.detach().double().numpy() for n, p in layer.named_parameters()}
    own = {n.split(".")[1]: v for n, v in values.items() if n.startswith("modification.")}
    further = {}
    if isinstance(modification, tokengate.methods.DoRA):
        further["W0"] = values["weight"]
    if isinstance(modification, tokengate.methods.Adapter):
        further["activation"] = modification.activation
    name = type(modification).__name__.lower()
    modify = functools.partial(getattr(reference, name), p=own, scale=modification.scale, **further)
    gate = layer.gate
    return reference.layer(
        x.detach().double().reshape(-1, x.shape[-1]).numpy(),
        values["weight"],
        values.get("bias"),
        own,
        modify,
        None if gate is None else float(values["gate.tau"][0]),
        0.0 if gate is None else gate.penalty,
        grad.detach().double().reshape(-1, grad.shape[-1]).numpy(),
        None if mask is None else mask.flatten().tolist(),
    )


def close_some(layer, x):
    """Set tau so that some positions are closed, none of them by a hair; how many are open."""
    w = F.linear(x, layer.weight)
    ratios = layer.modification.factors(x, w, layer).product(w).norm(dim=-1) / w.norm(dim=-1)
    ratios = ratios.detach().flatten().sort().values
    middle = ratios[1:-1]  # at least one stays open and one is closed
    below = int((middle[1:] / middle[:-1]).argmax())
    with torch.no_grad():
        layer.gate.tau.fill_(middle[below : below + 2].mean())
    return len(ratios) - below - 2


@pytest.fixture(params=[False, True], ids=["apart", "branched"])
def branched(request, monkeypatch):
    """Inputs as large as those whose gradients are added in place, and others, are both small."""
    monkeypatch.setattr(base, "_LARGE", 0 if request.param else 2**17)
    return request.param


def run(layer, x, mask):
    """The layer's output and S. A layer does not take a mask yet; its gate does."""
    if mask is None:
        with tokengate.record(layer, positions=True) as rec:
            h = layer(x)
        return h, rec.positions[""][0]
    out = F.linear(x, layer.weight, layer.bias)
    w = out if layer.bias is None else out - layer.bias
    factors = layer.modification.factors(x, w, layer)
    change = Change(out, layer.bias, factors)
    a = layer.gate(Positions(change, x, mask))
    return change.add(a), a.detach() != 0


@pytest.mark.filterwarnings("ignore:the rank is above both:tokengate.errors.RankWarning")
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=many(120), deadline=None)
@given(data=st.data())
def test_equals_reference(method, data):
    draw = data.draw
    shape = draw(st.sampled_from([(), (6,), (2, 5), (2, 3, 2), (0,)]))
    k, d, rank = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 8))
    bias, gate, masked, branched = (draw(st.booleans()) for _ in range(4))
    tau = draw(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 100.0]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, *SIXTEEN_BIT]))
    options = {"rank": rank, "scale": draw(st.sampled_from([0.3, 1.0, 2.0]))}
    if method == "adapter":
        # Rounding in 16 bits would cross relu's kink too often.
        smooth = ["gelu", "silu", "tanh"]
        names = smooth if dtype in SIXTEEN_BIT else [*smooth, "relu"]
        options["activation"] = draw(st.sampled_from(names))
    layer = layer_of(
        k,
        d,
        bias,
        dtype,
        method,
        gate,
        draw(st.integers(0, 1000)),
        tau=tau,
        penalty=0.01,
        **options,
    )
    x = torch.randn(*shape, k).to(dtype).requires_grad_()
    grad = torch.randn(*shape, d).to(dtype)
    mask = torch.randint(0, 2, shape) if gate and masked else None
    wanted = expect(layer, x, grad, mask)

    # Where the dtype's rounding could decide, there is nothing to compare.
    margin = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.1)
    W0 = layer.weight.detach().double().numpy()
    if method == "dora":
        product = layer.modification.B.detach().double() @ layer.modification.A.detach().double()
        added = options["scale"] * product.numpy()
        norm, *parts = (np.linalg.norm(rows, axis=1) for rows in (W0 + added, W0, added))
        assume(norm.min() > 0.1)
        # In 16 bits, products of W0 are rounded, which decides the norm where it nearly cancels.
        assume(dtype not in SIXTEEN_BIT or (norm > 0.5 * sum(parts)).all())
    if gate and tau > 0:
        w = np.linalg.norm(x.detach().double().reshape(-1, k).numpy() @ W0.T, axis=-1)
        assume(not (bias and dtype in SIXTEEN_BIT and (w < 0.5).any()))
        assume((np.abs(np.linalg.norm(wanted["m"], axis=-1) / w / tau - 1) > margin).all())

    with mock.patch.object(base, "_LARGE", 0 if branched else 2**17):
        h, opened = run(layer, x, mask)
    h.backward(grad)
    assert opened.flatten().tolist() == wanted["S"]
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4}.get(dtype, 0.1)

    def check(got, expected):
        expected = torch.as_tensor(expected, dtype=torch.float64).reshape(got.shape)
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * size)

    check(h.detach(), wanted["h"])
    check(x.grad, wanted["x"])
    for name, parameter in layer.modification.named_parameters():
        check(parameter.grad, wanted[name])
    if gate:
        terms = wanted["m"] * grad.double().reshape(-1, d).numpy()
        mu, size = np.abs(terms.sum(-1)), np.abs(terms).sum(-1)
        if (mu > margin * size).all():  # its sign decides which terms g has
            check(layer.gate.tau.grad, [wanted["tau"]])
        assert layer.gate.tau.grad.dtype == layer.gate.tau.dtype
    assert layer.weight.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_differs_where_it_should(method):
    layer = layer_of(4, 3, True, torch.float64, method, tau=1.0)
    x, grad = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    mixed = expect(layer, x, grad)
    assert 0 < sum(mixed["S"]) < 9
    with torch.no_grad():
        layer.gate.tau.fill_(0.0)
    opened = expect(layer, x, grad)
    assert not np.allclose(mixed["h"], opened["h"])
    assert opened["tau"] != expect(layer, x, grad, torch.arange(9) % 2)["tau"]
    for name, parameter in layer.modification.named_parameters():
        assert np.abs(opened[name]).min() > 0, name
        with torch.no_grad():
            parameter.mul_(1.1)
        assert not np.allclose(opened["h"], expect(layer, x, grad)["h"]), name
        with torch.no_grad():
            parameter.div_(1.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("gate", [False, True], ids=["ungated", "gated"])
def test_no_op_at_initialisation_bit_for_bit(method, dtype, bias, gate):
    layer = nn.Linear(16, 24, bias=bias).to(dtype)
    with torch.no_grad():
        layer.weight[3] = 0  # a row without a direction
    x = torch.randn(5, 7, 16).to(dtype)
    base = layer(x)
    tokengate.patch(layer, "all-linear", method, rank=4, gate=gate)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(layer(x).view(bits), base.view(bits))
    layer.train()(x).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.modification.parameters())
    away_from_initialisation(layer)
    assert not torch.equal(layer(x), base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_open_is_ungated_and_all_closed_is_base(method, dtype, bias):
    gated = layer_of(8, 8, bias, dtype, method, tau=-1.0)
    plain = layer_of(8, 8, bias, dtype, method, gate=False)
    x = torch.randn(3, 5, 8).to(dtype)
    with tokengate.disabled(gated):
        base = gated(x)
    assert not torch.equal(gated(x), base)
    assert torch.equal(gated(x), plain(x))
    with torch.no_grad():
        gated.gate.tau.fill_(1e9)
    assert torch.equal(gated(x), base)


@pytest.mark.parametrize("method", METHODS)
def test_permuting_tokens_permutes_outputs_and_a_row_stands_alone(method):
    layer = layer_of(8, 6, True, torch.float64, method, tau=0.8)
    x = torch.randn(4, 9, 8, dtype=torch.float64)
    order = torch.randperm(9)
    h = layer(x)
    assert not torch.allclose(h[:, order], h)
    torch.testing.assert_close(layer(x[:, order]), h[:, order])
    torch.testing.assert_close(layer(x[2]), h[2])
    torch.testing.assert_close(layer(x[2, 3]), h[2, 3])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("dropout", [0.1, 0.5], ids=["listed", "mask"])
def test_dropout_is_the_plain_one_on_the_low_rank_path(method, gate, dropout, branched):
    """What is kept of dropout gives the gradients of dropout in plain autograd."""
    layer = layer_of(64, 8, True, torch.float64, method, gate=gate, dropout=dropout)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert not torch.equal(layer(x), layer(x))

    torch.manual_seed(7)
    layer(x).square().sum().backward()
    taken = {n: p.grad for n, p in layer.modification.named_parameters()} | {"x": x.grad}
    layer.zero_grad()
    x.grad = None

    torch.manual_seed(7)
    factor = dropped_linear(torch.ones_like(x), torch.eye(64).double(), dropout, True, x.dtype)
    assert sorted(set(factor.flatten().tolist())) == [0, 1 / (1 - dropout)]
    p = layer.modification
    dropped = x * factor
    w = F.linear(x, layer.weight)
    if method == "adapter":
        m = F.relu(dropped @ p.D.T) @ p.U.T
    elif method == "adalora":
        m = dropped @ p.Q.T @ torch.diag(p.E) @ p.P.T
    else:
        m = dropped @ p.A.T @ p.B.T
    m = p.scale * m
    if method == "dora":
        c = p.magnitude / (layer.weight + p.scale * p.B @ p.A).norm(dim=1).detach()
        m = (c - 1) * w + c * m
    (w + m + layer.bias).square().sum().backward()
    for name, value in taken.items():
        plain = x.grad if name == "x" else getattr(p, name).grad
        assert plain.any()
        torch.testing.assert_close(value, plain)


@pytest.mark.parametrize("method", METHODS)
def test_no_dropout_in_evaluation(method):
    layer = layer_of(64, 8, True, torch.float32, method, gate=False, dropout=0.5)
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mixed", [False, True], ids=["open", "mixed"])
def test_gradcheck_twice(method, mixed, branched):
    """The first and second derivatives of a layer, with S fixed and DoRA's norm a constant."""
    options = {"activation": "tanh"} if method == "adapter" else {}
    layer = layer_of(4, 3, True, torch.float64, method, rank=2, **options)
    layer.gate.requires_grad_(False)
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    opened = close_some(layer, x) if mixed else 5
    with tokengate.record(layer, positions=True) as rec:
        layer(x)
    assert rec.positions[""][0].sum() == opened
    assert 0 < opened < 5 or not mixed
    if method == "dora":  # otherwise the numeric derivative sees what backward may not
        norms = layer.modification.row_norms(layer)
        layer.modification.row_norms = lambda linear: norms

    def f(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(f, (x, *values))
    assert torch.autograd.gradgradcheck(f, (x, *values))


@pytest.mark.parametrize("method", METHODS)
def test_per_sample_gradients_through_vmap(method):
    layer = layer_of(6, 4, True, torch.float64, method, tau=0.9, penalty=0.1)
    parameters = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    x = torch.randn(4, 5, 6, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name, gradients in each.items():
        assert len(gradients.flatten(1).unique(dim=0)) > 1, name
        alone = torch.stack([torch.func.grad(loss)(parameters, row)[name] for row in x])
        torch.testing.assert_close(gradients, alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", [False, True], ids=["ungated", "gated"])
def test_compiles_without_a_graph_break(method, gate):
    layer = layer_of(8, 6, True, torch.float32, method, gate=gate, dropout=0.3)
    torch.compiler.reset()  # each code object is recompiled for a few sets of options only
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 8)
    compiled(x).sum().backward()  # dropout draws other numbers there
    layer.eval()
    if gate:
        assert 0 < close_some(layer, x) < 10
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        h = module(x)
        h.square().sum().backward()
        results.append([h, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert len(results[0]) >= 3
    for eager, got in zip(*results, strict=True):
        assert eager.any()
        torch.testing.assert_close(got, eager)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(method, dtype):
    layer = layer_of(16, 12, True, torch.float32, method)
    x = torch.randn(2, 5, 16)
    assert 0 < close_some(layer, x) < 10
    results = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            h = layer(x)
        h.float().square().sum().backward()
        # g's terms depend on the signs of mu, which rounding may turn.
        results.append([h, *(p.grad for p in layer.modification.parameters())])
        assert layer.gate.tau.grad.dtype == torch.float32
    assert results[1][0].dtype == dtype
    assert not torch.equal(results[1][0].float(), results[0][0])
    for exact, got in zip(*results, strict=True):
        assert got is results[1][0] or got.dtype == torch.float32
        scale = exact.abs().max().item()
        torch.testing.assert_close(got.float(), exact, rtol=0, atol=0.05 * scale)


class AsItsInput(nn.Linear):
    """As quantised layers do: computes in 16 bits and returns the dtype of its input."""

    def forward(self, x):
        return super().forward(x.bfloat16()).to(x.dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", [False, True], ids=["ungated", "gated"])
def test_a_base_that_leaves_autocast(method, gate):
    layer = tokengate.patch(AsItsInput(6, 4).bfloat16(), "all-linear", method, gate=gate)
    away_from_initialisation(layer)
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(torch.randn(3, 6))
    assert h.dtype == torch.float32
    h.sum().backward()
    assert all(p.grad.any() for p in layer.modification.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_stand_alone(method):
    layer = layer_of(6, 4, True, torch.float32, method)
    x = torch.randn(3, 6)
    h = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), h)
        with torch.no_grad():
            other.weight.mul_(2)
        assert not torch.equal(other(x), h)
        assert torch.equal(layer(x), h)
