"""The gates that a schedule leads: firm, which is continuous, and fisher, which asks the loss."""

import copy

import numpy as np
import pytest
import reference
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation, one_sentence
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.gates import FirmGate, FisherGate

METHODS = ["lora", "dora", "adalora", "adapter"]
GATES = ["firm", "fisher"]


class Traced(torch.Tensor):
    """Is no plain tensor, so that a layer takes the way that can be traced."""


class Whole(tokengate.Modification):
    """A user's method without factors: M(x) = gain * w, of a rank that says nothing."""

    def __init__(self, linear, *, rank=3):
        super().__init__(linear)
        self.rank = rank
        self.gain = self.new_parameter(self.out_features)

    def reset_parameters(self):
        nn.init.zeros_(self.gain)

    def forward(self, x, w):
        return self.gain.to(w.dtype) * w * x[..., :1]


def layer_of(method, gate, bias=True, dtype=torch.float64, rank=3, **options):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=bias).to(dtype)
    tokengate.patch(layer, "all-linear", method, rank=rank, gate=gate, **options)
    return away_from_initialisation(layer)


def parts_of(layer, x):
    w = nn.functional.linear(x, layer.weight)
    factors = layer.modification.factors(x, w, layer)
    return w, factors, factors.product(w)


@settings(max_examples=many(40))
@given(data=st.data())
def test_firm_equals_a_loop(data):
    draw = data.draw
    method, bias = draw(st.sampled_from(METHODS)), draw(st.booleans())
    k, traced = draw(st.sampled_from([1.2, 2.0, 5.0])), draw(st.booleans())
    layer = layer_of(method, "firm", bias, gate_options={"k": k})
    torch.manual_seed(draw(st.integers(0, 99)))
    n = draw(st.integers(1, 6))
    x, grad = torch.randn(n, 6, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    w, _, m = parts_of(layer, x)
    r = (m.norm(dim=-1) / w.norm(dim=-1)).detach()
    tau = draw(st.sampled_from([0.0, 0.6, 0.9, 1.5])) * r.median().item()
    layer.gate.tau.fill_(tau)
    h = layer(x.as_subclass(Traced) if traced else x).as_subclass(torch.Tensor)
    numbers = [t.detach().numpy() for t in (w, m)]
    a, slopes = reference.firm_gate(*numbers, tau, k)
    wanted, grad_m, mu = reference.weighed(*numbers, a, grad.numpy())
    wanted = wanted + layer.bias.detach().numpy() if bias else wanted
    np.testing.assert_allclose(h.detach().numpy(), wanted, atol=1e-10)
    # dL/dm_i = a_i G_i + mu_i da_i/d||m_i|| m_i / ||m_i||, carried on by plain autograd.
    sizes = [reference.norm(m_i) or 1.0 for m_i in numbers[1]]
    through = [mu[i] * slopes[i] / sizes[i] * numbers[1][i] for i in range(n)]
    h.backward(grad)
    found = {name: p.grad for name, p in layer.modification.named_parameters()}
    parameters = dict(layer.modification.named_parameters())
    expected = torch.autograd.grad(
        m, [*parameters.values()], torch.from_numpy(grad_m + np.array(through)), allow_unused=True
    )
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6, msg=name)


def test_firm_has_parts_and_sends_nothing_to_closed_positions():
    layer, x = layer_of("lora", "firm"), torch.randn(200, 6, dtype=torch.float64)
    w, _, m = parts_of(layer, x)
    r = (m.norm(dim=-1) / w.norm(dim=-1)).detach()
    tau = r.median().item()
    layer.gate.tau.fill_(tau)
    share = ((layer(x) - nn.functional.linear(x, layer.weight, layer.bias)) / m)[:, 0].detach()
    assert (share[r < tau] == 0).all()
    torch.testing.assert_close(share[r >= 2 * tau], torch.ones_like(share[r >= 2 * tau]))
    between = (r > tau) & (r < 2 * tau)
    assert between.sum() > 20
    torch.testing.assert_close(share[between], 2 * (1 - tau / r[between]))
    layer(x)[r < tau].sum().backward()
    assert not layer.modification.B.grad.any()


def test_firm_at_the_edges():
    """M(x) = 0, w = 0, tau = 0 and below: open, and no gradient is NaN."""
    for tau in (0.0, -1.0, 0.5):
        layer = layer_of("lora", "firm")
        layer.gate.tau.fill_(tau)
        x = torch.randn(3, 6, dtype=torch.float64)
        x[0] = 0
        with torch.no_grad():
            layer.modification.B.zero_()
        layer(x).sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.modification.parameters())
        assert bool(layer.modification.B.grad.any()) == (tau <= 0)


def fed(layer, calls, grads, again=False, traced=False):
    """What backward has fed to the gate of a layer in one step."""
    layer.gate.count_in("_fed")
    for x, grad in zip(calls, grads, strict=True):
        x = x.clone().requires_grad_()
        x = x.as_subclass(Traced) if traced else x
        h = checkpoint(layer, x, use_reentrant=again == "reentrant") if again else layer(x)
        h.as_subclass(torch.Tensor).backward(grad)
    return layer.gate._fed.clone()


@pytest.mark.parametrize("again", [False, "reentrant", "not reentrant"])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("method", METHODS)
def test_fisher_is_fed_as_the_equation_says(method, traced, again):
    layer = layer_of(method, "fisher")
    calls = [torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(2)]
    grads = [torch.randn(2, 4, 5, dtype=torch.float64) for _ in calls]
    x, grad = torch.cat(calls).reshape(-1, 6), torch.cat(grads).reshape(-1, 5)
    _, factors, _ = parts_of(layer, x)
    wanted = reference.fisher((grad @ factors.up).detach().numpy())
    # Closed positions count, too.
    layer.gate.Q.copy_(torch.from_numpy(wanted))
    layer.gate.T.fill_(layer.gate.Q.trace().sqrt() * 0.5)
    s = (factors.z @ layer.gate.Q * factors.z).sum(-1).sqrt()
    assert 0 < (s < layer.gate.T).sum() < len(s)
    found = fed(layer, calls, grads, again, traced)
    assert found[-1] == 16
    np.testing.assert_allclose((found[:-1] / found[-1]).reshape(3, 3).numpy(), wanted, rtol=1e-9)


@settings(max_examples=many(30))
@given(data=st.data())
def test_fisher_equals_a_loop(data):
    draw = data.draw
    layer = layer_of(draw(st.sampled_from(METHODS)), "fisher", draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 99)))
    n = draw(st.integers(1, 6))
    x, root = torch.randn(n, 6, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    Q, T = root @ root.T, draw(st.sampled_from([0.0, 0.7, 1.4]))
    layer.gate.Q.copy_(Q)
    layer.gate.T.fill_(T)
    w, factors, m = parts_of(layer, x)
    is_open = reference.fisher_gate(factors.z.detach().numpy(), Q.numpy(), T)
    wanted = w + torch.tensor(is_open, dtype=torch.float64).unsqueeze(-1) * m
    wanted = wanted if layer.bias is None else wanted + layer.bias
    torch.testing.assert_close(layer(x), wanted)


def test_q_is_averaged_over_steps_from_its_first_value_on():
    gate = layer_of("lora", "fisher").gate
    values = [torch.rand(3, 3, dtype=torch.float64) for _ in range(4)]
    for step, value in enumerate(values, start=1):
        gate.fold(
            torch.cat([7 * value.flatten(), torch.tensor([7.0])]),
            torch.tensor(float(step), dtype=torch.float64),
        )
    wanted = reference.smoothed([value.numpy() for value in values], 0.9)
    np.testing.assert_allclose(gate.Q.numpy(), wanted, rtol=1e-12)
    before = gate.Q.clone()
    gate.fold(torch.zeros(10, dtype=torch.float64), torch.tensor(5.0))  # the layer was not called
    gate.fold(torch.full((10,), torch.inf, dtype=torch.float64), torch.tensor(5.0))
    assert torch.equal(gate.Q, before)


def test_padding_is_fed_to_nobody():
    layer, x = layer_of("lora", "fisher"), torch.randn(4, 6, dtype=torch.float64)
    grad = torch.randn(4, 5, dtype=torch.float64)
    kept = torch.tensor([True, True, False, True])
    wanted = fed(layer, [x[kept]], [grad[kept]])
    with tokengate.restrict(layer, kept):
        torch.testing.assert_close(fed(layer, [x], [grad]), wanted)


def test_a_method_without_factors_has_the_counterpart_of_r():
    layer = layer_of(Whole, "fisher", bias=False)
    with torch.no_grad():
        layer.modification.gain.normal_()
    assert layer.gate.rank is None
    x, grad = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    x[0] = 0
    w = nn.functional.linear(x, layer.weight)
    m = layer.modification(x, w).detach()
    mu, r = (m * grad).sum(-1)[1:], (m.norm(dim=-1) / w.norm(dim=-1))[1:]
    layer.gate.fold(fed(layer, [x], [grad]), torch.tensor(1.0))
    rms = mu.square().mean().sqrt() / r.square().mean().sqrt()
    torch.testing.assert_close(layer.gate.Q.sqrt().reshape(()), rms)
    T = 0.8 * (r * rms).median()
    layer.gate.T.copy_(T)
    is_open = (layer(x) != w).any(-1)[1:]
    assert torch.equal(is_open, r * rms >= T)
    assert 0 < is_open.sum() < 8


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_is_the_same(gate, method):
    torch.compiler.reset()  # or these would count among the recompilations of one forward
    layer, x = layer_of(method, gate, dtype=torch.float32), torch.randn(3, 4, 6)
    grad = torch.randn(3, 4, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    tokengate.SparsitySchedule(layer, optimizer, 0.5, 10)
    if gate == "firm":
        layer.gate.tau.fill_(0.2)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        h = run(x)
        h.backward(grad)
        own = [layer.gate._seen, *([layer.gate._fed] if gate == "fisher" else [])]
        found.append([h.detach(), *(p.grad for p in layer.modification.parameters())])
        found[-1] += [t.clone() for t in own]
        for t in own:
            t.zero_()
    assert found[0][-1].any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gate", GATES)
def test_it_is_the_base_at_first_trains_saves_and_loads(gate, tmp_path):
    base, x = Net(), torch.randn(2, 5, 8)
    model = tokengate.patch(copy.deepcopy(base), ["q_proj", "fc1"], gate=gate, rank=2)
    assert torch.equal(model(x), base(x))
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.05))
    assert len(optimizer.param_groups) == 1
    tokengate.SparsitySchedule(model, optimizer, 0.5, 12)
    for _ in range(12):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    with tokengate.record(model) as rec:
        after = model(x)
    assert 0.2 < rec.report().sparsity < 0.8
    assert all(module.tau > 0 for module in rec.report().modules.values())
    tokengate.save(model, tmp_path)
    for into in (
        copy.deepcopy(base),
        tokengate.patch(copy.deepcopy(base), ["q_proj", "fc1"], gate=gate, rank=2),
    ):
        tokengate.load(into, tmp_path)
        assert torch.equal(into.eval()(x), after)
    half = copy.deepcopy(model).to(torch.bfloat16)
    kept = {t.dtype for layer in tokengate.layers(half).values() for t in layer.gate.buffers()}
    assert kept == {torch.float32}


@pytest.mark.parametrize("gate", GATES)
def test_it_is_calibrated(gate):
    layer, x = layer_of("lora", gate), torch.randn(8, 50, 6, dtype=torch.float64)
    if gate == "fisher":
        layer.gate.Q.copy_(torch.eye(3))
    tokengate.calibrate(layer, [(x,)], sparsity=0.4)
    with tokengate.record(layer) as rec:
        layer(x)
    assert abs(rec.report().sparsity - 0.4) < 0.01


def test_calibrate_says_what_stands_in_its_way():
    """Of a trained model it said that M(x) is 0; what a schedule set anew was lost."""
    model = tokengate.patch(Net(), ["fc1"], rank=2, gate="fisher")
    away_from_initialisation(model)
    batches = [torch.randn(2, 4, 8)]
    with one_sentence("no gradient", "train with a SparsitySchedule"):
        tokengate.calibrate(model, batches)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
    with one_sentence("a SparsitySchedule sets anew", "detach()"):
        tokengate.calibrate(model, batches)
    model(batches[0]).square().mean().backward()
    optimizer.step()
    schedule.detach()
    assert all(tokengate.calibrate(model, batches).values())


def test_what_is_wrong_is_said():
    with one_sentence("k=1 is not above 1"):
        tokengate.patch(Net(), ["fc1"], gate="firm", gate_options={"k": 1})
    model = Net()
    for method, rank, found in (("lora", 2, "LoRA has one of 3"), (Whole, 4, "Whole has no fact")):
        with one_sentence(f"rank={rank} was given to a FisherGate", found):
            tokengate.patch(
                model, ["fc1"], method, rank=3, gate="fisher", gate_options={"rank": rank}
            )
    assert not tokengate.layers(model), "it was refused in the first forward only"
    layer = layer_of("lora", "fisher", gate_options={"rank": 3})
    assert isinstance(layer.gate, FisherGate)
    assert not isinstance(layer.gate, FirmGate)
