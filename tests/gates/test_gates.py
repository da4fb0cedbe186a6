"""Gates other than the paper's: a user's own, the soft one, the random one; `patch(gate=)`."""

import copy

import numpy as np
import pytest
import reference
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation, one_sentence, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.gates import Positions, RandomGate, SigmoidGate, registry
from tokengate.kernels.change import Change
from tokengate.kernels.factors import Factors

METHODS = ["lora", "dora", "adalora", "adapter"]


@pytest.fixture
def own(monkeypatch):
    """A gate of a user's, registered for this test: it is open above a limit that is learned."""
    monkeypatch.setattr(registry.GATES, "kinds", dict(registry.GATES.kinds))

    @tokengate.register_gate("soft")
    class Soft(tokengate.Gate):
        def __init__(self, linear, *, start=0.0):
            super().__init__(linear)
            self.limit = self.new_parameter(1)
            nn.init.constant_(self.limit, start)

        def weights(self, positions):
            return torch.sigmoid(2 * (positions.r.clamp(max=1e3) - self.limit))

    return Soft


class Traced(torch.Tensor):
    """Is no plain tensor, so that a layer takes the way that can be traced."""


def layer_of(method="lora", gate="threshold", bias=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=bias).to(dtype)
    tokengate.patch(layer, "all-linear", method, rank=3, gate=gate, **options)
    return away_from_initialisation(layer)


def parts_of(layer, x):
    """w, m and what the layer would add them to, from the modification itself."""
    w = nn.functional.linear(x, layer.weight)
    factors = layer.modification.factors(x, w, layer)
    return w, factors.product(w).detach()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_gate_gets_mu_at_every_position_and_the_sum_is_weighed(own, method, bias):
    layer, x = layer_of(method, "soft", bias), torch.randn(4, 6, dtype=torch.float64)
    w, m = parts_of(layer, x)
    r = m.norm(dim=-1) / w.norm(dim=-1)
    limit = torch.zeros((), dtype=torch.float64, requires_grad=True)
    a = torch.sigmoid(2 * (r - limit))
    grad = torch.randn(4, 5, dtype=torch.float64)
    h = layer(x)
    wanted, _, grad_a = reference.weighed(*(t.detach().numpy() for t in (w, m, a, grad)))
    if bias:
        wanted = wanted + layer.bias.detach().numpy()
    np.testing.assert_allclose(h.detach().numpy(), wanted, atol=1e-12)
    assert (h - nn.functional.linear(x, layer.weight, layer.bias)).abs().max() > 0.01
    h.backward(grad)
    a.backward(torch.from_numpy(grad_a))
    assert abs(limit.grad) > 1e-3
    torch.testing.assert_close(layer.gate.limit.grad.reshape(()), limit.grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_gradients_flow_through_sizes(own, method, bias, traced):
    """As plain autograd has them, of h = w + a m with a from ||m|| / ||w||."""
    layer = layer_of(method, "soft", bias)
    layer.weight.requires_grad_(True)
    x = torch.randn(4, 6, dtype=torch.float64)
    x[3] = 0  # w_i = 0, r is infinite and clamped: no gradient is NaN
    grad = torch.randn(4, 5, dtype=torch.float64)

    def plain(x):
        w = nn.functional.linear(x, layer.weight)
        m = layer.modification.factors(x, w, layer).product(w)
        some = (w != 0).any(-1)
        r = torch.linalg.vector_norm(m, dim=-1) / torch.where(some, w.norm(dim=-1), 1)
        a = torch.sigmoid(2 * (torch.where(some, r, torch.inf).clamp(max=1e3) - layer.gate.limit))
        return w + a.unsqueeze(-1) * m + (layer.bias if bias else 0), a

    def gradients(h, inputs):
        return torch.autograd.grad(h, inputs, grad)

    own_x = x.clone().requires_grad_()
    inputs = (own_x, *(p for p in layer.parameters() if p.requires_grad))
    h, a = plain(own_x)
    some = torch.autograd.grad(a.sum(), inputs[1:], retain_graph=True, allow_unused=True)
    assert max(g.abs().max() for g in some if g is not None) > 1e-3
    wanted = gradients(h, inputs)
    found = gradients(layer(own_x.as_subclass(Traced) if traced else own_x), inputs)
    for one, other in zip(found, wanted, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one.as_subclass(torch.Tensor), other)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("method", METHODS)
def test_a_buffer_is_fed_in_backward(method, traced):
    """Q = sum of g g', g_i = dL/dz_i as if a_i were 1, at closed positions too; once each."""

    class Fed(tokengate.Gate):
        def __init__(self, linear):
            super().__init__(linear)
            self.register_buffer("Q", torch.zeros(3, 3, dtype=torch.float64))

        def weights(self, positions):
            positions.learn(self.add)
            return positions.x[..., 0] > 0

        def add(self, z, g):
            self.Q += (g.flatten(0, -2).T @ g.flatten(0, -2)).detach()

    layer, x = layer_of(method, Fed), torch.randn(2, 4, 6, dtype=torch.float64)
    grad = torch.randn(2, 4, 5, dtype=torch.float64)
    if traced:
        x = x.as_subclass(Traced)
    w = nn.functional.linear(x, layer.weight)
    factors = layer.modification.factors(x, w, layer)
    g = (grad @ factors.up).reshape(-1, 3).detach()
    is_open = (x[..., 0] > 0).flatten()
    assert 0 < is_open.sum() < 8
    once = g.T @ g
    for _ in range(2):  # micro-batches
        checkpoint(layer, x.requires_grad_(), use_reentrant=False).backward(grad)
    torch.testing.assert_close(layer.gate.Q, 2 * once)


def test_positions_tell_what_they_say():
    z, up = torch.randn(2, 3, 4), torch.randn(5, 4)
    w, x, mask = torch.randn(2, 3, 5), torch.randn(2, 3, 6), torch.ones(2, 3)
    positions = Positions(Change(w, None, Factors(z, up)), x, mask)
    m = z @ up.T
    assert positions.shape == (2, 3)
    assert positions.z is z
    assert positions.x is x
    assert positions.mask is mask
    torch.testing.assert_close(positions.m_norm, m.norm(dim=-1))
    torch.testing.assert_close(positions.w_norm, w.norm(dim=-1))
    torch.testing.assert_close(positions.r, m.norm(dim=-1) / w.norm(dim=-1))
    assert Positions(Change(w, None, m), x).z is None


@pytest.mark.parametrize("derived", [False, True])
def test_sizes_have_one_dtype_whatever_the_values_are(derived):
    """Where what is left of M(x) is near rounding, it is measured in wider numbers."""
    z, up = torch.randn(300, 4), torch.randn(64, 4)
    near = up.clone()
    near[:, 1:] = -up[:, :1] / 3
    for factor, alike in ((up, torch.randn(300, 4)), (near, 1 + 1e-4 * z)):
        positions = Positions(
            Change(torch.randn(300, 64), None, Factors(alike.requires_grad_(derived), factor))
        )
        norms = (alike @ factor.T).norm(dim=-1).detach()
        torch.testing.assert_close(positions.m_norm.detach(), norms, rtol=1e-3, atol=1e-6)
        assert positions.m_norm.requires_grad == derived
        assert positions.m_norm.dtype == positions.r.dtype == positions.dtype == torch.float32


@pytest.mark.parametrize("gate", ["sigmoid", "random", "soft"])
def test_it_changes_nothing_at_first_trains_saves_and_loads(own, gate, tmp_path):
    model, base, x = Net(), None, torch.randn(2, 5, 8)
    base = copy.deepcopy(model)
    tokengate.patch(model, ["q_proj", "fc1"], gate=gate, rank=2)
    assert torch.equal(model(x), base(x))
    gates = [p for n, p in model.named_parameters() if ".gate." in n]
    start = [p.detach().clone() for p in gates]
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.05))
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(model(x), base(x))
    assert all((p != q).any() for p, q in zip(gates, start, strict=True))
    assert bool(gates) == (gate != "random")
    tokengate.save(model, tmp_path)
    for into in (
        copy.deepcopy(base),
        tokengate.patch(copy.deepcopy(base), ["q_proj", "fc1"], gate=gate, rank=2),
    ):
        tokengate.load(into, tmp_path)
        assert torch.equal(into.eval()(x), model(x))
    with one_sentence(f"the gate '{gate}' in the adapter and 'threshold' here"):
        tokengate.load(tokengate.patch(copy.deepcopy(base), ["q_proj", "fc1"], rank=2), tmp_path)
    tokengate.unpatch(model)
    assert torch.equal(model(x), base(x))


@settings(max_examples=many(60))
@given(data=st.data())
def test_the_sigmoid_gate_equals_a_loop(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    n, penalty = draw(st.integers(1, 5)), draw(st.sampled_from([0.0, 0.3]))
    training, masked = draw(st.booleans()), draw(st.booleans())
    layer = layer_of(
        gate="sigmoid", penalty=penalty, gate_options={"start": draw(st.sampled_from([-1.0, 0.5]))}
    )
    layer.train(training)
    with torch.no_grad():
        layer.gate.v.normal_()
    x, grad = torch.randn(n, 6, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    mask = (torch.rand(n) < 0.6).double() if masked else None
    w, m = (t.detach() for t in parts_of(layer, x))
    change = Change(w, None, m)
    a = layer.gate(Positions(change, x, mask))
    v, c = layer.gate.v.detach().numpy(), layer.gate.c.item()
    wanted = reference.sigmoid_gate(x.numpy(), v, c, training)
    np.testing.assert_allclose(a.detach().numpy(), wanted, rtol=1e-12)
    if training:
        change.add(a).backward(grad)
        _, _, mu = reference.weighed(w.numpy(), m.numpy(), wanted, grad.numpy())
        grad_v, grad_c = reference.sigmoid_backward(x.numpy(), wanted, mu, penalty, mask)
        np.testing.assert_allclose(layer.gate.v.grad.numpy(), grad_v, atol=1e-12)
        np.testing.assert_allclose(layer.gate.c.grad.item(), grad_c, atol=1e-12)


# The gates alone are trained.
@pytest.mark.filterwarnings("ignore:SGD leaves out:tokengate.errors.LeftOutWarning")
def test_the_entropy_penalty_leads_to_0_or_1():
    layer, x = layer_of(gate="sigmoid", penalty=1.0), torch.randn(40, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.v.normal_(std=0.3)
        layer.gate.c.zero_()
    optimizer = torch.optim.SGD(layer.gate.parameters(), lr=0.05)
    before = layer.gate(Positions(Change(*parts_of(layer, x)[:1], None, parts_of(layer, x)[1]), x))
    for _ in range(50):
        optimizer.zero_grad()
        (0 * layer(x)).sum().backward()
        optimizer.step()
    after = layer.gate(Positions(Change(*parts_of(layer, x)[:1], None, parts_of(layer, x)[1]), x))
    assert (before - 0.5).abs().mean() < 0.25
    assert (after - 0.5).abs().mean() > 0.4


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_random_gate_closes_its_share(sparsity, dtype):
    layer = layer_of(gate="random", dtype=dtype, gate_options={"sparsity": sparsity})
    x = torch.randn(40, 100, 6).to(dtype)
    with tokengate.record(layer, positions=True) as rec:
        h = layer(x)
    assert abs(rec.report().sparsity - sparsity) < 0.03
    is_open = rec.positions[""][0]
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(h[~is_open], base[~is_open])
    assert sparsity == 0 or is_open.any(1).sum() > 0
    # The same wherever it is computed: alone, and again.
    with tokengate.record(layer, positions=True) as alone:
        layer(x[3:4])
    assert torch.equal(alone.positions[""][0], is_open[3:4])
    other = layer_of(gate="random", dtype=dtype, gate_options={"sparsity": sparsity, "seed": 1})
    assert torch.equal(other(x) == base, h == base) == (sparsity == 0)


def test_each_layer_has_the_gate_of_its_pattern():
    model = tokengate.patch(
        Net(), ["q_proj", "v_proj", "fc1"], tau=0.25,
        gate={"*.q_proj": "threshold", "*.v_proj": False, "*": RandomGate},
    )  # fmt: skip
    gates = {name: layer.gate for name, layer in tokengate.layers(model).items()}
    assert [type(gates[f"blocks.0.{n}"]).__name__ for n in ("q_proj", "v_proj", "fc1")] == [
        "TokenGate", "NoneType", "RandomGate",
    ]  # fmt: skip
    assert gates["blocks.1.q_proj"].tau.item() == 0.25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gate": "sigmod"}, ["did you mean 'sigmoid'", "threshold"]),
        ({"gate": None}, ["unknown gate None"]),
        ({"gate": nn.Linear}, ["unknown gate"]),
        ({"gate": "random", "gate_options": {"sparsity": 1.5}}, ["sparsity=1.5"]),
        (
            {"gate": "random", "gate_options": {"share": 0.5}},
            ["unknown option 'share'", "sparsity"],
        ),
        ({"gate": "random", "tau": 0.1}, ["tau=0.1", "RandomGate"]),
        ({"gate": "threshold", "gate_options": 3}, ["gate_options=3 is no dict"]),
        ({"gate": {"*.fc1": "random"}}, ["no pattern for the layer"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_changed(arguments, words):
    model = Net()
    before = snapshot(model)
    with one_sentence(*words):
        tokengate.patch(model, ["q_proj"], **arguments)
    assert snapshot(model) == before


def test_weights_of_another_shape_are_refused(own):
    class Wrong(own):
        def weights(self, positions):
            return super().weights(positions)[..., :1]

    layer = layer_of(gate=Wrong)
    with one_sentence("Wrong gave weights of shape (4, 1) for positions of shape (4, 2)"):
        layer(torch.randn(4, 2, 6, dtype=torch.float64))


@pytest.mark.parametrize("gate", ["soft", "threshold", "firm", "fisher", "sigmoid", "random"])
def test_a_vector_is_one_position(own, gate):
    layer = layer_of(gate=gate)
    x = torch.randn(6, dtype=torch.float64)

    def gradients(h):
        layer.zero_grad()
        h.sum().backward()
        return [p.grad for p in layer.parameters() if p.grad is not None]

    for training in (True, False):
        layer.train(training)
        alone, first = layer(x), layer(x.unsqueeze(0))[0]
        assert torch.equal(alone, first)
        found = gradients(alone)
        assert found
        assert all(map(torch.equal, found, gradients(first)))


def test_an_unregistered_gate_is_not_saved(own, tmp_path):
    class Nameless(own):
        pass

    layer = layer_of(gate=Nameless)
    with one_sentence("gated by Nameless", "register_gate"):
        tokengate.save(layer, tmp_path)


def test_what_wants_a_threshold_says_so():
    model = tokengate.patch(Net(), ["q_proj"], gate="random")
    x = torch.randn(1, 3, 8)
    what = "whose layers have no gates with a threshold", "patch it with gate='threshold', 'firm'"
    with one_sentence(*what):
        tokengate.calibrate(model, [(x,)])
    with one_sentence(*what):
        tokengate.History(model)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    assert len(optimizer.param_groups) == 1
    with one_sentence("none of whose layers has a gate with a threshold"):
        tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
    with tokengate.record(model) as rec:
        model(x)
    assert {m.tau for m in rec.report().modules.values()} == {None}
    assert "blocks" in str(rec.report()) or rec.report().sparsity > 0


def test_a_gate_with_a_threshold_is_calibrated_and_learns_as_tau(own):
    class Limited(own):
        @property
        def threshold(self):
            return self.limit

        def weights(self, positions):
            return positions.r >= self.limit

    layer, x = layer_of(gate=Limited), torch.randn(8, 50, 6, dtype=torch.float64)
    tokengate.calibrate(layer, [(x,)], sparsity=0.4)
    with tokengate.record(layer) as rec:
        layer(x)
    assert abs(rec.report().sparsity - 0.4) < 0.01
    assert rec.report().modules[""].tau == layer.gate.limit.item() > 0
    first, second = tokengate.param_groups(layer, lr=1e-3, s=1e-4)
    assert [id(p) for p in second["params"]] == [id(layer.gate.limit)]
    assert id(layer.gate.limit) not in map(id, first["params"])


@pytest.mark.parametrize("gate", ["sigmoid", "random"])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_is_the_same(gate, method):
    torch.compiler.reset()  # or these would count among the recompilations of one forward
    layer, x = layer_of(method, gate, dtype=torch.float32), torch.randn(3, 4, 6)
    plain = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), plain)


def test_scale_penalty_reaches_entropy():
    layer, x = layer_of(gate="sigmoid", penalty=0.5), torch.randn(7, 6, dtype=torch.float64)
    found = []
    for factor in (1, 4):
        tokengate.scale_penalty(layer, factor)
        layer.zero_grad()
        (0 * layer(x)).sum().backward()
        found.append(layer.gate.c.grad.item())
    assert found[1] == pytest.approx(4 * found[0])
    assert isinstance(layer.gate, SigmoidGate)


def test_an_adapter_with_other_options_of_its_gate_does_not_fit(tmp_path):
    tokengate.save(layer_of(gate="random", gate_options={"sparsity": 0.9}), tmp_path)
    into = layer_of(gate="random", gate_options={"sparsity": 0.1})
    with one_sentence("sparsity=0.9 in the adapter and sparsity=0.1 in the model"):
        tokengate.load(into, tmp_path)
    tokengate.load(layer_of(gate="random", gate_options={"sparsity": 0.9}), tmp_path)


@pytest.mark.parametrize("value", [(1, 2), float("nan"), {1}])
def test_options_that_json_cannot_hold_are_not_saved(value, tmp_path):
    class Odd(tokengate.Gate):
        def __init__(self, linear, *, odd=None):
            super().__init__(linear)

        def weights(self, positions):
            return positions.r >= 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.GATES, "kinds", {**registry.GATES.kinds, "odd": Odd})
        model = tokengate.patch(Net(), ["fc1"], gate="odd", gate_options={"odd": value})
        with one_sentence("save found odd=", "JSON cannot hold"):
            tokengate.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
