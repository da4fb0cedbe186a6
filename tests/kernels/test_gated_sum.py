"""The quick sum of a layer's output and its gated modification, where it goes its own ways."""

import inspect

import pytest
import torch
from models import Keeps, away_from_initialisation
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokengate
from tokengate.gates.positions import Positions
from tokengate.gates.threshold import TokenGate
from tokengate.kernels import change as change_module
from tokengate.kernels import gated_sum, gram
from tokengate.kernels.change import Change
from tokengate.kernels.factors import Factors
from tokengate.kernels.norms import norms, opened, times


def layer_of(method, kind=nn.Linear, bias=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = kind(12, 10, bias=bias).to(dtype)
    tokengate.patch(layer, "all-linear", method, rank=4, **options)
    return away_from_initialisation(layer)


def sums_of(layer, x):
    """The output, S and all gradients of one call."""
    x = x.clone().requires_grad_()
    with tokengate.record(layer, positions=True) as rec:
        h = layer(x)
    (h.float() * torch.linspace(-1, 1, h.shape[-1])).sum().backward()
    grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    return [h.detach(), rec.positions[""][0], x.grad, *grads]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("gate", [True, False], ids=["gated", "ungated"])
def test_blocks_are_one(method, bias, gate, monkeypatch):
    layer = layer_of(method, bias=bias, gate=gate)
    x = torch.randn(5, 7, 12)
    if gate:
        tokengate.calibrate(layer, [(x,)], sparsity=0.5)
    whole = sums_of(layer, x)
    if gate:
        assert 0 < whole[1].float().mean() < 1
    blocks = []
    cut = gated_sum.blocks

    def counted(rows):
        parts = list(cut(rows))
        blocks.append(len(parts))
        return parts

    monkeypatch.setattr(gated_sum, "blocks", counted)
    monkeypatch.setattr(gated_sum, "_BLOCK", 30)
    found = sums_of(layer, x)
    # Only what is as wide as the output is divided.
    assert set(blocks) == ({12} if method == "dora" or (bias and gate) else set())
    for one, other in zip(whole, found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e-24, torch.float32),
        (1e24, torch.float32),
        (1e-200, torch.float64),
        (1e200, torch.float64),
    ],
)
def test_squares_out_of_range(method, size, dtype, monkeypatch):
    """Norms whose squares the dtype does not hold decide as those of inputs of usual size."""
    monkeypatch.setattr(gram, "_SMALL", 0)
    layer = layer_of(method, bias=False, dtype=dtype)
    x = torch.randn(40, 12, dtype=dtype)
    tokengate.calibrate(layer, [(x,)], sparsity=0.5)
    wanted = sums_of(layer, x)[1]
    assert 0 < wanted.float().mean() < 1
    assert torch.equal(sums_of(layer, x * size)[1], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_from_products_of_columns(dtype, monkeypatch):
    ways = []
    quick = gram._from_gram
    monkeypatch.setattr(
        gram, "_from_gram", lambda z, up, wide: ways.append(wide) or quick(z, up, wide)
    )
    torch.manual_seed(0)
    z, up = torch.randn(40, 4).to(dtype), torch.randn(10, 4).to(dtype)
    found = times(*gram.norms_of_product(z, up))
    exact = (z.double() @ up.double().T).norm(dim=1)
    small = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=small, atol=0)
    assert not ways  # M(x) is small, and measured itself
    monkeypatch.setattr(gram, "_SMALL", 0)
    found = times(*gram.norms_of_product(z, up))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    assert ways == ([] if dtype == torch.float64 else [torch.float32])


def test_tau_s_gradient_where_backward_runs_within_autocast():
    layer, x = layer_of("lora"), torch.randn(9000, 12)
    tokengate.calibrate(layer, [(x,)], sparsity=0.5)
    found = []
    for within in (False, True):
        layer.zero_grad()
        h = layer(x)
        with torch.autocast("cpu", torch.float16, enabled=within):
            (3e3 * h).sum().backward()
        found.append(layer.gate.tau.grad.clone())
    assert found[0].abs() > 65504  # which is float16's largest
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=0)


def test_columns_that_cancel(monkeypatch):
    """Of M(x) = up z little is left where the columns of `up` are nearly one: rounding, in
    float32 squares."""
    torch.manual_seed(0)
    column = torch.randn(50, 1)
    up = torch.cat([column, column + 1e-4 * torch.randn(50, 1)], dim=1)
    z = torch.randn(30, 1) * torch.tensor([1.0, -1.0])
    plain = gram._from_gram(z, up, torch.float32)[0].clamp(min=0).sqrt()
    exact = (z.double() @ up.double().T).norm(dim=1)
    assert (plain / exact - 1).abs().max() > 0.01
    monkeypatch.setattr(gram, "_SMALL", 0)
    found, _ = gram.norms_of_product(z, up)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


class Watched(TorchDispatchMode):
    """Keeps what products gave, and tells whether one of these was written over."""

    def __init__(self):
        super().__init__()
        self.products, self.written = [], []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        if f is torch.ops.aten.mm.default:
            self.products.append(result)
        if f is torch.ops.aten.addmm_.default:
            given = {product.data_ptr() for product in self.products}
            self.written.append(args[0].data_ptr() in given)
        return result


def test_an_output_of_others_is_not_written_over():
    x = torch.randn(5, 12)
    layer = layer_of("lora", Keeps)
    h = layer(x)
    assert not torch.equal(h, layer.given)
    assert torch.equal(layer.given, nn.functional.linear(x, layer.weight, layer.bias))


def test_its_own_output_is_written_over_unless_someone_watches(monkeypatch):
    layer, x = layer_of("lora", bias=False), torch.randn(5, 12)
    written = []
    apply = gated_sum.GatedSum.apply
    monkeypatch.setattr(
        gated_sum.GatedSum, "apply", lambda *args: written.append(args[-3]) or apply(*args)
    )
    plain = layer(x)
    with Watched() as watched:
        assert torch.equal(layer(x), plain)
    assert written == [True, False]
    assert watched.products
    assert watched.written == [False]


def test_an_infinite_gradient_at_a_closed_position_passes_no_further_than_up():
    w, z = torch.randn(3, 6), torch.ones(3, 2, requires_grad=True)
    z.data[0] = 1e-3
    up = torch.randn(6, 2, requires_grad=True)
    gate = TokenGate(0.1)
    change = Change(w, None, Factors(z, up))
    a = gate(Positions(change))
    h, is_open = change.add(a), a.detach() != 0
    assert (
        is_open.tolist()
        == opened(norms(z.detach() @ up.detach().T, w.dtype), norms(w, w.dtype), gate.tau).tolist()
        == [False, True, True]
    )
    h.backward(torch.tensor([[torch.inf], [1.0], [1.0]]).expand(3, 6))
    assert not z.grad[0].any()
    assert z.grad[1:].isfinite().all()
    assert z.grad[1:].all()
    assert not up.grad.isfinite().any()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_caller_may_write_over_the_output(method, bias):
    layer, x = layer_of(method, bias=bias), torch.randn(2, 5, 12)
    h = layer(x)
    wanted = h.detach() + 1
    h += 1  # as Falcon does
    assert torch.equal(h, wanted)
    h.sum().backward()
    assert layer.modification.B.grad.any()


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("kind", ["factors", "whole", "traced"])
def test_gradients_of_fractional_weights(gain, kind, monkeypatch):
    """a in [0, 1) is an input like any other: its gradient is mu, also of the second order."""
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    w, z, up, factor, m = leaf(3, 5), leaf(3, 2), leaf(5, 2), leaf(5), leaf(3, 5)
    a = torch.tensor([0.3, 0.0, 0.8], dtype=torch.float64, requires_grad=True)
    if kind == "traced":
        monkeypatch.setattr(change_module, "is_eager", lambda *tensors: False)

    def summed(w, a, *parts):
        made = parts[0] if kind == "whole" else Factors(*parts)
        return Change(w, None, made).add(a)

    parts = (m,) if kind == "whole" else (z, up, factor) if gain else (z, up)
    assert torch.autograd.gradcheck(summed, (w, a, *parts))
    assert torch.autograd.gradgradcheck(summed, (w, a, *parts))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
@pytest.mark.parametrize("gate", ["threshold", "sigmoid"])
def test_no_signature_is_bound_in_a_step(method, gate, monkeypatch):
    # It takes as long as the arithmetic of a few positions.
    bound = []
    of = inspect.signature

    def counted(function, *args, **kwargs):
        bound.append(function)
        return of(function, *args, **kwargs)

    layer, x = layer_of(method, gate=gate, dropout=0.5).train(), torch.randn(3, 12)
    monkeypatch.setattr(inspect, "signature", counted)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.gate.parameters())
    assert not bound
    torch.func.grad(lambda x: layer(x).sum())(x)  # transforms want it: so this can fail
    assert bound


def of_size(bias, gain):
    """A function of its parts to the sizes of M(x), with a weight for each, and those parts."""
    torch.manual_seed(3)
    weights = torch.tensor([0.0, 1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    parts = {
        "out": torch.randn(5, 4, dtype=torch.float64),
        "z": torch.randn(5, 2, dtype=torch.float64),
        "up": torch.randn(4, 2, dtype=torch.float64),
        "bias": torch.randn(4, dtype=torch.float64) if bias else None,
        "gain": torch.randn(4, dtype=torch.float64) if gain else None,
    }
    names = [name for name, part in parts.items() if part is not None]

    def f(*values):
        at = dict(zip(names, values, strict=True))
        m = Factors(at["z"], at["up"], at.get("gain"))
        return Change(at["out"], at.get("bias"), m).size_of_m() * weights

    return f, [parts[name].requires_grad_() for name in names]


@pytest.mark.parametrize("gain", [False, True], ids=["no gain", "gain"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_sizes_have_their_gradients(bias, gain, monkeypatch):
    f, parts = of_size(bias, gain)
    assert torch.autograd.gradcheck(f, parts)
    assert torch.autograd.gradgradcheck(f, parts)
    monkeypatch.setattr(gated_sum, "_BLOCK", 8)  # two positions at a time
    assert torch.autograd.gradcheck(f, parts)


def test_positions_whose_size_has_no_gradient_are_not_made_again():
    f, parts = of_size(bias=False, gain=True)
    with torch.no_grad():
        parts[0][0] = torch.nan  # of a weight of 0
    f(*parts)[1:].sum().backward()
    assert not parts[2].grad.isnan().any()
    assert parts[0].grad[1:3].all()
    assert not parts[0].grad[3].any()


def test_gradients_of_sizes_are_not_summed_in_16_bits(monkeypatch):
    """Block after block they were, ten times as far off."""
    monkeypatch.setattr(gated_sum, "_BLOCK", 64)
    torch.manual_seed(0)
    parts = [torch.randn(4096, 8), torch.randn(4096, 2), torch.randn(8, 2), torch.randn(8)]
    parts[0] += 1
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        out, z, up, gain = (part.bfloat16().to(dtype).requires_grad_() for part in parts)
        Change(out, None, Factors(z, up, gain)).size_of_m().sum().backward()
        grads.append([up.grad.float(), gain.grad.float()])
    for wanted, found in zip(*grads, strict=True):
        assert (found - wanted).norm() / wanted.norm() < 0.004
