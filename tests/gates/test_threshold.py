"""token_gate against the equations: eq. 2, 4, 10, 14, 15 and 17."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from drawing import many
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokengate
from tokengate.kernels.change import Change
from tokengate.kernels.norms import opened as decided

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# What rounding an input-sized sum costs: a few units in the last place of the accumulation,
# and of the output's own dtype for the output.
ACCUMULATION = {torch.float64: 1e-12}
OUTPUT = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def run(w, m, tau, penalty, grad, mask=None):
    """token_gate's output and the gradients of w, m and tau."""
    w, m = w.clone().requires_grad_(), m.clone().requires_grad_()
    tau = torch.tensor([tau], dtype=torch.float64 if w.dtype == torch.float64 else torch.float32)
    tau.requires_grad_()
    h = tokengate.token_gate(w, m, tau, penalty, mask)
    h.backward(grad)
    return h.detach(), w.grad, m.grad, tau.grad


def open_positions(w, m, tau):
    """S as booleans, as the gate decides it."""
    return decided(*Change(w, None, m).norms(), tau)


def check_against_reference(w, m, tau, penalty, grad, mask=None):
    """Everything token_gate gives equals the loop; returns the loop's S and g."""
    flat = [t.double().reshape(-1, t.shape[-1]).numpy() for t in (w, m, grad)]
    real = None if mask is None else mask.reshape(-1).bool().tolist()
    tau = float(np.float32(tau)) if w.dtype != torch.float64 else tau
    h, opened = reference.gate_forward(flat[0], flat[1], tau)
    grad_w, grad_m, g = reference.gate_backward(flat[1], opened, flat[2], penalty, real)
    ours = run(w, m, tau, penalty, grad, mask)
    # mu's rounding error is relative to the size of its terms.
    size = float(np.abs(flat[1] * flat[2]).sum()) + penalty * len(opened)
    assert (
        open_positions(w, m, torch.tensor([tau], dtype=torch.float64)).flatten().tolist() == opened
    )
    shape = w.shape
    for got, wanted in zip(ours[:3], (h, grad_w, grad_m), strict=True):
        wanted = torch.from_numpy(wanted).reshape(shape)
        torch.testing.assert_close(got.double(), wanted, rtol=OUTPUT[w.dtype], atol=0)
    tolerance = ACCUMULATION.get(w.dtype, 1e-5) * size
    assert ours[3].shape == (1,)
    assert abs(ours[3].item() + g) <= tolerance
    return opened, g


@st.composite
def problems(draw):
    """w, m, grad of every dtype and shape, m of every size, and a tau that is no near-tie."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.sampled_from([(3,), (5, 4), (2, 3, 8), (2, 3, 2, 4), (0, 4), (7, 1), (2, 0, 3)])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(scale):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    w, grad = normal(1.0), normal(draw(st.sampled_from([1e-3, 1.0, 100.0])))
    m = normal(draw(st.sampled_from([0.0, 0.01, 0.3, 3.0])))
    norms = [t.double().norm(dim=-1) for t in (w, m)]
    ratios = (norms[1] / norms[0]).flatten()
    quantile = draw(st.floats(0, 1))
    tau = draw(st.sampled_from([-0.5, 0.0, None, 100.0]))
    if tau is None:
        tau = float(ratios.quantile(quantile)) * 1.003 if len(ratios) else 0.1
    assume(tau == 0 or ((ratios / tau - 1).abs() > 1e-3).all())
    if draw(st.booleans()):  # make it non-contiguous
        w, m, grad = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (w, m, grad))
    mask = None
    if draw(st.booleans()):
        mask = torch.randint(0, 2, shape[:-1], generator=generator)
    penalty = draw(st.sampled_from([0.0, 1e-5, 0.7]))
    return w, m, tau, penalty, grad, mask


@settings(max_examples=many(400), deadline=None)
@given(problems())
def test_equals_reference(problem):
    check_against_reference(*problem)


def one_position(mu, opened):
    """w, m, grad of one position with the given mu and gate, for tau = 0.5."""
    w, m = torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]]) * (1.0 if opened else 0.01)
    return w, m, mu * m / m.square().sum()


@pytest.mark.parametrize(
    ("mu", "opened", "wanted"),
    [
        (2.0, True, 2.0 + 0.25),  # open and harmful: raise tau
        (-2.0, True, 0.25),  # open and useful: only lambda
        (0.0, True, 0.25),
        (2.0, False, 0.0),  # closed and rightly so
        (-2.0, False, -2.0),  # closed but would be useful: lower tau
        (0.0, False, 0.0),
    ],
    ids=["open+", "open-", "open0", "closed+", "closed-", "closed0"],
)
def test_every_branch_of_eq_17(mu, opened, wanted):
    w, m, grad = one_position(mu, opened)
    got_open, g = check_against_reference(w, m, 0.5, 0.25, grad)
    assert got_open == [opened]
    assert g == pytest.approx(wanted)
    assert run(w, m, 0.5, 0.25, grad)[3].item() == pytest.approx(-wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_is_open(dtype):
    w = torch.tensor([[3.0, 4.0], [5.0, 12.0], [8.0, 15.0]], dtype=dtype)
    m = 0.5 * w.flip(-1)  # norms 2.5, 6.5 and 8.5: exact in every dtype
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    for tau, opened in [(below, True), (0.5, True), (above, False)]:
        got = open_positions(w, m, torch.tensor([tau])).tolist()
        assert got == [opened] * 3, tau


@pytest.mark.parametrize("tau", [0.0, -0.0, -1e-3, -1e30])
def test_tau_not_above_zero_is_always_open(tau):
    w = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1e30, 1e30], [1.0, 1.0]])
    m = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1e-38, 0.0], [1.0, 2.0]])
    assert open_positions(w, m, torch.tensor([tau])).all()
    assert not open_positions(w, m, torch.tensor([1e-3])).all()  # it can be closed


def test_zero_w_is_open_and_divides_nothing():
    w, m = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [1e-30, 0, 0]])
    check_against_reference(w, m, 5.0, 0.1, torch.ones(2, 3))
    assert open_positions(w, m, torch.tensor([5.0])).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_modification_is_seen(bad):
    w, m = torch.ones(2, 3), torch.tensor([[bad, 0.0, 0.0], [0.0, 0.0, 0.0]])
    h, _, grad_m, grad_tau = run(w, m, 1e6, 0.5, torch.ones(2, 3))
    assert not h[0].isfinite().all()
    assert torch.equal(h[1], w[1])  # the other position is closed
    assert torch.equal(grad_m, torch.tensor([[1.0] * 3, [0.0] * 3]))
    # NaN >= 0 is false, which is not S: eq. 14 leaves a NaN out; an infinite mu is kept.
    assert grad_tau.item() == (-0.5 if math.isnan(bad) else -math.inf)


def test_a_nan_gradient_does_not_pass_a_closed_gate():
    grad = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    _, grad_w, grad_m, _ = run(torch.ones(2, 2), torch.full((2, 2), 1e-3), 0.5, 0.0, grad)
    assert torch.equal(grad_m, torch.zeros(2, 2))
    assert grad_w.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-120, -75, 0, 63, 120])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_huge_and_tiny_values(dtype, exponent, ratio):
    scale = 2.0**exponent
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 5, generator=generator).to(dtype) * scale
    m = ratio * w.flip(-1)
    for tau, opened in [(0.5, ratio > 0.5), (2.0, False), (0.1, True)]:
        got = open_positions(w, m, torch.tensor([tau])).tolist()
        assert got == [opened] * 6
        assert got == [
            reference.is_open(a, b, tau) for a, b in zip(w.double(), m.double(), strict=True)
        ]


def test_plain_float32_norms_would_fail_there():
    assert torch.linalg.vector_norm(torch.full((4,), 1e30)).isinf()
    assert torch.linalg.vector_norm(torch.full((4,), 1e-30)) == 0


def test_values_of_very_different_sizes():
    w = torch.tensor([[1e-38, 1e-38], [3e38, 3e38], [1e-45, 0.0]])
    m = torch.tensor([[3e38, 3e38], [1e-38, 1e-38], [1e-45, 0.0]])
    assert open_positions(w, m, torch.tensor([0.5])).tolist() == [True, False, True]


@settings(max_examples=many(60), deadline=None)
@given(problems(), st.lists(st.integers(0, 10), max_size=4))
def test_any_split_into_micro_batches_gives_the_same_g(problem, cuts):
    w, m, tau, penalty, grad, mask = problem
    assume(w.dim() > 1)
    whole = run(w, m, tau, penalty, grad, mask)[3]
    edges = [0, *sorted(c % (len(w) + 1) for c in cuts), len(w)]
    parts = torch.zeros(1, dtype=whole.dtype)
    for a, b in itertools.pairwise(edges):
        part = None if mask is None else mask[a:b]
        parts += run(w[a:b], m[a:b], tau, penalty, grad[a:b], part)[3]
    size = (m.double() * grad.double()).abs().sum().item() + penalty * w[..., 0].numel()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5 * size + 1e-30)


def test_mask_changes_g_but_no_output():
    generator = torch.Generator().manual_seed(1)
    w, m, grad = (torch.randn(2, 6, 4, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    plain, masked = run(w, m, 0.9, 0.3, grad), run(w, m, 0.9, 0.3, grad, mask)
    assert plain[3] != masked[3]
    for a, b in zip(plain[:3], masked[:3], strict=True):
        assert torch.equal(a, b)
    dropped = run(w[mask.bool()], m[mask.bool()], 0.9, 0.3, grad[mask.bool()])
    torch.testing.assert_close(masked[3], dropped[3])
    assert torch.equal(masked[3], run(w, m, 0.9, 0.3, grad, mask.bool())[3])
    assert torch.equal(masked[3], run(w, m, 0.9, 0.3, grad, mask.float())[3])


def test_closed_is_w_bit_for_bit():
    w = torch.tensor([[-0.0, 1.0, 1e-40], [0.0, -3.0, 2.0]])
    h = tokengate.token_gate(w, torch.full_like(w, 1e-3), torch.tensor([0.5]))
    assert torch.equal(h.view(torch.int32), w.view(torch.int32))
    opened = tokengate.token_gate(w, torch.full_like(w, 1e-3), torch.tensor([0.0]))
    assert not torch.equal(opened, w)


@pytest.mark.parametrize("tau", [0.0, 0.8, 100.0], ids=["open", "mixed", "closed"])
def test_gradcheck_with_s_fixed(tau):
    generator = torch.Generator().manual_seed(2)
    w, m = (torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    opened = open_positions(w, m, torch.tensor([tau]))
    assert opened.any() == (tau < 100)
    assert opened.all() == (tau == 0)

    def f(w, m):
        return tokengate.token_gate(w, m, tau)

    inputs = (w.requires_grad_(), m.requires_grad_())
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_gradcheck_can_fail():
    def wrong(w, m):
        return tokengate.token_gate(w, m, 0.0) + m.detach()

    inputs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(wrong, inputs)


def test_per_sample_gradients_through_vmap():
    generator = torch.Generator().manual_seed(3)
    w, m = (torch.randn(4, 5, 3, generator=generator) for _ in range(2))
    tau = torch.tensor([0.9])

    def loss(tau, w, m):
        return tokengate.token_gate(w, m, tau, 0.1).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(tau, w, m)
    alone = torch.stack([torch.func.grad(loss)(tau, w[i], m[i]) for i in range(4)])
    assert each.unique().numel() == 4
    torch.testing.assert_close(each, alone)


def test_a_frozen_tau_saves_no_modification():
    saved = []
    w, m = torch.randn(8, 16), torch.randn(8, 16, requires_grad=True)

    def pack(t):
        saved.append(t.shape)
        return t

    for trained in (True, False):
        saved.clear()
        tau = torch.tensor([0.1], requires_grad=trained)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tokengate.token_gate(w, m, tau)
        assert (torch.Size([8, 16]) in saved) == trained


def test_float32_modification_of_a_16_bit_output_keeps_its_dtype():
    w = torch.ones(3, 4, dtype=torch.bfloat16)
    m = torch.full((3, 4), 0.5, requires_grad=True)
    h = tokengate.token_gate(w, m, 0.1)
    h.sum().backward()
    assert h.dtype == torch.bfloat16
    assert m.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda w: (w, w[:, :2], 0.1), r"w has shape \(3, 4\) and m \(3, 2\)"),
        (lambda w: (w[0, 0], w[0, 0], 0.1), r"w has shape \(\)"),
        (lambda w: (w.tolist(), w, 0.1), "w is a list: pass a tensor"),
        (lambda w: (w, w, 0.1, 0.0, [1, 1, 1]), "mask is a list: pass a tensor"),
        (lambda w: (w.long(), w, 0.1), "dtype torch.int64"),
        (lambda w: (w, w, torch.zeros(2)), r"tau has shape \(2,\)"),
        (lambda w: (w, w, torch.tensor([1])), "tau has shape .* dtype torch.int64"),
        (lambda w: (w, w, math.nan), "tau=nan is not a finite number"),
        (lambda w: (w, w, 0.1, -1e-5), "penalty=-1e-05 is negative"),
        (lambda w: (w, w, 0.1, math.inf), "penalty=inf is not a finite number"),
        (lambda w: (w, w, 0.1, 0.0, torch.ones(4)), r"mask has shape \(4,\) for .* \(3,\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.token_gate(*arguments(torch.ones(3, 4)))


def test_a_gradient_of_a_gradient_reaches_tau():
    """As through the sum by traced operations; and whoever looks at a is told its gradient."""
    found = []
    for traced in (False, True):
        torch.manual_seed(0)
        layer = tokengate.patch(torch.nn.Sequential(torch.nn.Linear(6, 5)), ["0"], rank=2, tau=0.3)[
            0
        ]
        layer.double()
        layer.modification.B.data.normal_()
        told = []

        def watch(gate, args, a, told=told):
            a.register_hook(told.append)

        layer.gate.register_forward_hook(watch)
        x = torch.randn(24, 6, dtype=torch.float64, requires_grad=True)
        h = layer(x.as_subclass(Traced) if traced else x)
        (g,) = torch.autograd.grad(h.sin().sum(), x, create_graph=True)
        g.square().sum().backward()
        assert told
        found.append(layer.gate.tau.grad)
    assert abs(found[0]) > 1e-3
    torch.testing.assert_close(*found)


class Traced(torch.Tensor):
    """Is no plain tensor, so that a layer takes the way that can be traced."""
