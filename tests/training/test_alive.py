"""No gate trains dead, collapses before M(x) has grown, or stays wide open, without a word."""

import pytest
import torch
from mixtures import Experts, Mixture
from models import away_from_initialisation, one_sentence
from torch import nn

import tokengate
from tokengate.errors import UselessGateWarning


def made(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return tokengate.patch(model, "all-linear", rank=4, **options)


def train(model, optimizer, steps):
    """The sparsity of every step's forward, and the last loss."""
    generator, path = torch.Generator().manual_seed(0), []
    goal = torch.randn(6, 3, generator=generator)
    for _ in range(steps):
        x = torch.randn(8, 10, 6, generator=generator)
        optimizer.zero_grad()
        with tokengate.record(model) as rec:
            loss = (model(x) - x @ goal).square().mean()
        path.append(rec.report().sparsity)
        loss.backward()
        optimizer.step()
    return path, loss.item()


@pytest.mark.parametrize("moved", ["param_groups", "follow", "by itself"])
def test_a_tau_above_0_before_a_new_modification_is_refused(moved):
    """It closes all: A, B and tau got no gradient, the loss stayed as it was, without a word."""
    model = made(tau=0.01)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    if moved == "follow":
        tokengate.follow(model, optimizer, s=1e-3)
    if moved == "by itself":
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with one_sentence("tau is 0.01 in front of 2 modifications that are 0", "patch with tau=0"):
        train(model, optimizer, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_step_that_moves_nothing_is_none():
    """torch.distributed.checkpoint takes one with gradients of 0, to make an optimiser's state."""
    model = made(tau=0.01)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    rates = [group["lr"] for group in optimizer.param_groups]
    for rate in (0.0, torch.tensor(0.0)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        train(model, optimizer, 1)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    with one_sentence("tau is 0.01 in front of 2 modifications that are 0", "patch with tau=0"):
        train(model, optimizer, 1)


def test_a_trained_modification_may_have_it():
    model = away_from_initialisation(made(tau=0.05))
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-4))
    _, loss = train(model, optimizer, 3)
    _, later = train(model, optimizer, 40)
    assert later < loss
    model = made(tau=0.01)  # a schedule begins with all open
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    tokengate.SparsitySchedule(model, optimizer, 0.5, 20)
    path, _ = train(model, optimizer, 20)
    assert path[0] == 0 < path[-1] < 1


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("steps", [20, 50, 200])
@pytest.mark.parametrize("follows", [False, True])
def test_tau_does_not_outrun_what_grows(steps, lr, follows):
    """With absolute steps all was closed after six of them, and most at the end."""
    model = made()
    if follows:
        optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=lr)[:1], momentum=0.9)
        tokengate.follow(model, optimizer, total_steps=steps)
    else:
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=lr, total_steps=steps))
    path, _ = train(model, optimizer, steps)
    assert max(path[: steps // 5]) < 0.2
    assert max(path) < 0.9
    assert tokengate.layers(model)["0"].gate.tau > 0


def test_the_pace_is_in_units_of_r():
    """The first step of Adam is s whatever the gradient: 2 / 10 of the median."""
    model = away_from_initialisation(made())
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.0, total_steps=10))
    x = torch.randn(8, 10, 6)
    medians = []
    for name, layer in tokengate.layers(model).items():
        into = x if name == "0" else model[1](model[0](x))
        w = nn.functional.linear(into, layer.weight)
        m = layer.modification(into, w)
        medians.append((m.norm(dim=-1) / w.norm(dim=-1)).median())
    model(x).square().mean().backward()
    optimizer.step()
    moved = torch.cat([layer.gate.tau.detach() for layer in tokengate.layers(model).values()])
    torch.testing.assert_close(moved.abs(), 0.2 * torch.stack(medians).detach(), rtol=0.03, atol=0)
    # Whoever gives s gets that.
    model = away_from_initialisation(made())
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.0, s=0.01))
    model(x).square().mean().backward()
    optimizer.step()
    for layer in tokengate.layers(model).values():
        assert abs(layer.gate.tau.item()) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"s": 0.05, "lr": 1e-4}, "closes all positions"), ({"lr": 1e-2}, "closes no position")],
)
def test_a_gate_that_does_nothing_is_told_of_once(options, words):
    model = made(penalty=1e-2)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, **options))
    with pytest.warns(UselessGateWarning) as told:
        path, _ = train(model, optimizer, 66)
    assert len(told) == 1
    assert words in str(told[0].message)
    assert "SparsitySchedule" in str(told[0].message)
    assert path[-1] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("start", "steps", "words"),
    [(2.0, 64, "closes no position"), (-5.0, 16, "closes all"), (-60.0, 16, "closes all")],
)
def test_a_gate_without_a_threshold_that_does_nothing_is_told_of_once(start, steps, words):
    """As it will decide in evaluation; of a start of -60 nothing gets a gradient."""
    model = made(gate="sigmoid", gate_options={"start": start})
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-4))
    train(model, optimizer, steps - 1)
    told = rf"after {steps} steps of AdamW SigmoidGate, .* {words}.* in the 2 layers.*'start': 0"
    with pytest.warns(UselessGateWarning, match=told):
        train(model, optimizer, 1)
    train(model, optimizer, 5)
    mixed = made(gate="sigmoid", gate_options={"start": 0.0})
    train(mixed, torch.optim.AdamW(tokengate.param_groups(mixed, lr=1e-4)), 70)


class Inner(tokengate.Gate):
    """Whose parameters are those of a module inside of it."""

    closes_below = 0.5

    def __init__(self, linear):
        super().__init__(linear)
        self.decides = nn.Linear(linear.in_features, 1)

    def weights(self, positions):
        return self.decides(positions.x).squeeze(-1).sigmoid()

    def scores(self, positions):
        return self.weights(positions).detach() + 1


def test_a_gate_with_modules_inside_is_looked_at_likewise():
    """It was a StopIteration out of the optimiser's step."""
    model = made(gate=Inner)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-4))
    train(model, optimizer, 63)
    with pytest.warns(UselessGateWarning, match="64 steps of AdamW Inner, .* closes no position"):
        train(model, optimizer, 1)


def test_a_dead_layer_beside_one_that_lives_is_told_of():
    """As where an adapter of fewer layers was loaded: the living one excused it for good."""
    model = made(tau=0.01)
    first, second = tokengate.layers(model).values()
    away_from_initialisation(model)
    second.modification.B.data.zero_()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3, s=1e-5))
    with pytest.warns(UselessGateWarning, match="0 everywhere in 1 of the 2 layers") as told:
        train(model, optimizer, 20)
    assert len(told) == 1
    assert first.modification.B.grad.any()
    assert not second.modification.B.any()


@pytest.mark.parametrize("gate", ["firm", "fisher"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_gate_that_nobody_leads_is_told_of_once(gate, loaded):
    """Not told of was one with a threshold, as loaded: M(x) grew past it, .6 closed became 0."""
    model = made(gate=gate)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    if loaded:
        schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 40)
        train(model, optimizer, 40)
        schedule.detach()
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    with pytest.warns(UselessGateWarning, match="no SparsitySchedule leads") as told:
        path, _ = train(model, optimizer, 12)
    assert len(told) == 1
    assert (path[0] > 0.5) == loaded
    assert set(path) == {0.0} or loaded


def test_a_model_may_be_trained_in_evaluation_mode():
    """As `from_pretrained` returns it: no r was counted, and tau stayed 0 without a word."""
    taus = []
    for training in (True, False):
        model = made().train(training)
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, total_steps=20))
        train(model, optimizer, 20)
        taus.append([layer.gate.tau.item() for layer in tokengate.layers(model).values()])
    assert taus[0] == taus[1]
    assert min(taus[1]) > 0
    model = made(gate="fisher").eval()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    tokengate.SparsitySchedule(model, optimizer, 0.5, 20)
    path, _ = train(model, optimizer, 20)
    assert path[0] == 0 < path[-1] < 1


def test_of_experts_too_it_is_told_and_others_gates_are_not_meant():
    """The look at step 16 ended in a ValueError: one gate has a tau for each expert."""
    index = torch.arange(20).view(10, 2) % 4

    def experts(**options):
        torch.manual_seed(0)
        model = Mixture(Experts(4, 3, 6, way="grouped"))
        tokengate.patch(model, ["experts.w"], rank=2, experts={"experts.w": "eoi"}, **options)
        return model, torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))

    def step(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(10, 6), index).square().mean().backward()
            optimizer.step()

    unled, optimizer = experts(gate="firm")
    step(unled, optimizer, 7)
    other = experts()
    step(*other, 63)  # whose optimiser has nothing to do with those
    with pytest.warns(UselessGateWarning, match="after 64 steps .* closes no position in the 1 "):
        step(*other, 1)
    with pytest.warns(UselessGateWarning, match="1 gates, e.g. FirmGate"):
        step(unled, optimizer, 1)
    step(unled, optimizer, 4)


def test_compiled_code_is_not_compiled_anew_to_be_looked_at():
    """At step 16 it was, whole."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = made()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(18):
        optimizer.zero_grad()
        compiled(torch.ones(2, 4, 6)).square().mean().backward()
        optimizer.step()
    assert len(graphs) == 1


def test_a_new_layer_beside_trained_ones_comes_to_life(tmp_path):
    """Their threshold closed all of it at once, and for good."""

    def started(targets):
        torch.manual_seed(0)
        parts = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)]
        model = tokengate.patch(nn.Sequential(*parts), targets, rank=4, gate="fisher")
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
        return model, optimizer

    model, optimizer = started(["0", "2"])
    tokengate.SparsitySchedule(model, optimizer, 0.5, 60)
    train(model, optimizer, 60)
    tokengate.save(model, tmp_path)
    model, optimizer = started("all-linear")
    tokengate.load(model, tmp_path, strict=False)
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, 60)
    path, _ = train(model, optimizer, 60)
    assert path[0] > 0.2  # the others', of three layers
    with tokengate.record(model) as rec:
        model(torch.randn(8, 10, 6))
    assert rec.report().modules["4"].sparsity < 0.6
    assert abs(schedule.sparsity - 0.5) < 0.1
    # One that is pruned to nothing is not new.
    tokengate.layers(model)["4"].modification.B.data.zero_()
    schedule.detach()
    again = tokengate.SparsitySchedule(model, optimizer, 0.5, 60)
    train(model, optimizer, 1)
    assert again.wanted > 0.4
