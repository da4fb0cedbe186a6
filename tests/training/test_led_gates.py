"""What a schedule finds, is asked and cannot do: it happens as one expects, or is said."""

import copy
import pickle

import pytest
import torch
from models import away_from_initialisation, one_sentence
from torch import nn

import tokengate
from tokengate.errors import UselessGateWarning
from tokengate.gates import living

pytestmark = pytest.mark.usefixtures("one_thread")


def made(gate="threshold", method="lora", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return tokengate.patch(model, "all-linear", method, rank=2, gate=gate, **options)


def adam(model, **options):
    return torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, **options))


def train(model, optimizer, steps, size=1.0, start=0):
    """The sparsity of every step's forward."""
    path = []
    for step in range(start, start + steps):
        x = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        with tokengate.record(model) as rec:
            loss = size * (model(x) - x[..., :3]).square().mean()
        path.append(rec.report().sparsity)
        loss.backward()
        optimizer.step()
    return path


def gates_of(model):
    return [layer.gate for layer in tokengate.layers(model).values()]


@pytest.mark.parametrize("gate", ["firm", "fisher", "frozen"])
def test_nothing_learns_what_nothing_trains(gate):
    """`learn_from` was accepted, and from there on nothing moved."""
    model = made("threshold" if gate == "frozen" else gate)
    if gate == "frozen":
        for each in gates_of(model):
            each.tau.requires_grad_(False)
    optimizer = adam(model)
    with one_sentence("learn_from=0.5 was asked of 2 gates", "that of '0'", "nothing trains"):
        tokengate.SparsitySchedule(model, optimizer, 0.5, 10, learn_from=0.5)
    assert not any(each.is_led for each in gates_of(model))
    tokengate.SparsitySchedule(model, optimizer, 0.5, 10)


def test_it_begins_before_it_hands_over():
    """Nothing was closed, and taus went on from 0."""
    model = made()
    optimizer = adam(model)
    with one_sentence("warmup_steps=6", "total_steps=10 and learn_from=0.5", "pass fewer"):
        tokengate.SparsitySchedule(model, optimizer, 0.5, 10, warmup_steps=6, learn_from=0.5)
    assert not any(each.is_led for each in gates_of(model))
    tokengate.SparsitySchedule(model, optimizer, 0.5, 10, warmup_steps=4, learn_from=0.5)


@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
def test_of_an_optimizer_that_never_steps_is_told(gate):
    """The Trainer or a script makes another one: all stayed open, without a word."""
    model = made(gate)
    never, optimizer = adam(model), adam(model)
    schedule = tokengate.SparsitySchedule(model, never, 0.5, 20)
    train(model, optimizer, 7)
    words = "trained for 8 steps of AdamW and the optimizer of the SparsitySchedule .* taken none"
    with pytest.warns(UselessGateWarning, match=words) as told:
        train(model, optimizer, 4)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert schedule.steps == 0


def test_of_an_optimizer_of_something_else_is_told():
    model, other = made(), nn.Linear(2, 2)
    wrong = torch.optim.SGD(other.parameters(), lr=0.1)
    tokengate.SparsitySchedule(model, wrong, 0.5, 20)
    with pytest.warns(UselessGateWarning, match="an SGD that holds no parameter of the 2 layers"):
        train(model, wrong, 2)


@pytest.mark.parametrize("method", ["lora", "adalora", "dora"])
@pytest.mark.parametrize("gate", ["threshold", "firm"])
def test_a_threshold_above_0_that_nobody_moves_starts_dead(method, gate):
    """A frozen tau before a new M(x): no gradient of its own told of it."""
    model = made(gate, method)
    for each in gates_of(model):
        each.threshold.requires_grad_(False).fill_(0.01)
    optimizer = adam(model)
    x = torch.randn(4, 5, 6)
    (model(x).square().mean() + (tokengate.orthogonality(model) if method == "adalora" else 0)
     ).backward()  # fmt: skip
    with one_sentence("tau is 0.01 in front of 2 modifications that are 0"):
        optimizer.step()
    # Before one that is trained it may be what it likes.
    train(away_from_initialisation(model), adam(model), 3)


@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
@pytest.mark.parametrize("target", [0.6, 0.3])
def test_what_is_closed_is_where_the_share_goes_on(gate, target):
    """It began with all open again, also before a model whose thresholds were trained."""
    model = away_from_initialisation(made(gate), 0.3)
    optimizer = adam(model)
    tokengate.SparsitySchedule(model, optimizer, 0.6, 30)
    train(model, optimizer, 30)
    model = copy.deepcopy(model)  # as one that is loaded
    before = [each.threshold.clone() for each in gates_of(model)]
    optimizer = adam(model)
    schedule = tokengate.SparsitySchedule(model, optimizer, target, 30)
    assert all(map(torch.equal, (each.threshold for each in gates_of(model)), before))
    path = train(model, optimizer, 30, start=40)
    assert abs(path[0] - 0.6) < 0.1
    assert schedule.state_dict()["start"] == pytest.approx(path[0], abs=0.02)
    assert all(abs(share - (0.6 + target) / 2) < 0.2 + abs(0.6 - target) / 2 for share in path)
    assert abs(path[-1] - target) < 0.1


def test_a_tau_that_patch_was_given_is_none_that_was_trained():
    model = made(tau=0.05)
    optimizer = adam(model)
    tokengate.SparsitySchedule(model, optimizer, 0.6, 20)
    assert not any(each.tau.any() for each in gates_of(model))
    assert train(model, optimizer, 20)[0] == 0


class Scaler(torch.amp.GradScaler):
    """Whose factor changes at each step."""

    def update(self, *args):
        super().update(64.0 if self.get_scale() < 1e3 else 1024.0 * 8)


@pytest.mark.parametrize("fused", [False, True])
def test_fisher_is_fed_without_the_factor_of_a_scaler(fused):
    """Its Q was in units of the factor: a million times as large, and other after each change."""
    ends = []
    for scaler in (None, Scaler("cpu", init_scale=1024.0)):
        model = away_from_initialisation(made("fisher"))
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2), fused=fused)
        tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
        for step in range(6):
            x = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        ends.append([each.Q.clone() for each in gates_of(model)])
    assert all(bool(q.any()) for q in ends[0])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "dora", "adapter"])
@pytest.mark.parametrize("gate", ["threshold", "fisher"])
def test_scores_are_those_without_dropout(method, gate):
    """Held out there is none: thresholds of dropped inputs closed 3 to 7 points too many."""
    counts = []
    for dropout in (0.0, 0.4):
        model = away_from_initialisation(made(gate, method, dropout=dropout))
        tokengate.SparsitySchedule(model, adam(model), 0.5, 10)
        first = next(iter(gates_of(model)))
        if gate == "fisher":
            first.Q.copy_(torch.eye(2))
        h = model[0](torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(0)))
        counts.append((first._seen.clone(), h))
    assert not torch.equal(counts[0][1], counts[1][1])
    assert torch.equal(counts[0][0], counts[1][0])


def test_who_holds_no_gate_is_not_asked_in_each_step(monkeypatch):
    """All living gates were listed six times in a step of any optimiser: 300 took it 2.6 ms."""
    listed, real = [0], living.living

    def counted():
        listed[0] += 1
        return real()

    monkeypatch.setattr(living, "living", counted)
    model, foreign = made(), nn.Linear(2, 2)
    other, own = torch.optim.SGD(foreign.parameters(), lr=0.1), adam(model)
    foreign(torch.ones(2)).sum().backward()
    assert living.held_by(other) == []
    train(model, own, 2)
    assert len(living.taus_held_by(own)) == 2
    listed[0] = 0
    for _ in range(5):
        other.step()
    train(model, own, 3, start=2)
    assert listed[0] == 0
    # What is new is found: another gate, or another parameter of one.
    gate = gates_of(model)[0]
    gate.tau = nn.Parameter(gate.tau.detach().clone())
    assert len(living.taus_held_by(own)) == 1
    own.add_param_group({"params": [gate.tau]})
    assert len(living.taus_held_by(own)) == 2
    gate._parameters["tau"] = nn.Parameter(gate.tau.detach().clone())  # as sharding does
    assert len(living.taus_held_by(own)) == 1
    assert listed[0] >= 3


def test_a_state_of_no_step_gives_the_first_thresholds_back():
    model = made()
    optimizer = adam(model)
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
    state = schedule.state_dict()
    train(model, optimizer, 8)
    assert all(gate.tau > 0 for gate in gates_of(model))
    schedule.load_state_dict(state)
    assert all(gate.tau == 0 for gate in gates_of(model))
    without = {key: value for key, value in state.items() if key != "led"}
    for old in (without, {**state, "tracker": {"shape": torch.zeros(4, 1, 8)}}):
        with one_sentence("of an earlier version", "anew"):
            schedule.load_state_dict(old)


def test_one_threshold_is_not_for_scores_of_two_kinds():
    """One layer was open wholly and another closed, with the share of both together as asked."""
    model = made({"0": "fisher", "2": "threshold"})
    optimizer = adam(model)
    with one_sentence("asked to lead FisherGate and TokenGate by one threshold", "per_layer=True"):
        tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
    tokengate.SparsitySchedule(model, optimizer, 0.5, 10, per_layer=True)
    path = train(model, optimizer, 10)
    assert path[0] == 0
    assert path[-1] == pytest.approx(0.5, abs=0.1)


def test_a_schedule_that_has_ended_holds_nothing_that_another_one_leads():
    """The second one's taus had no gradients when it had handed them over."""
    model = made()
    optimizer = adam(model, s=1e-3)
    first = tokengate.SparsitySchedule(model, optimizer, 0.3, 10)
    train(model, optimizer, 12)
    assert first.steps == 12
    tokengate.SparsitySchedule(model, optimizer, 0.6, 10, learn_from=0.5)
    train(model, optimizer, 6)
    handed_over = [gate.tau.item() for gate in gates_of(model)]
    train(model, optimizer, 4)
    assert all(g.tau.item() != tau for g, tau in zip(gates_of(model), handed_over, strict=True))


@pytest.mark.filterwarnings("ignore:.*'unused' of ModuleDict was patched but never called")
def test_a_layer_that_is_never_called_is_not_missed_in_the_share():
    """It counted as open: "ended with 30%"."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})
    tokengate.patch(model, "all-linear", rank=2)
    optimizer = adam(model)
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 60, per_layer=True)
    for _ in range(60):
        x = torch.randn(16, 5, 6)
        optimizer.zero_grad()
        (model["used"](x) - x[..., :3]).square().mean().backward()
        optimizer.step()
    assert schedule.sparsity == pytest.approx(0.6, abs=0.1)


def test_a_warmup_as_long_as_all_is_refused():
    model = made()
    with one_sentence("warmup_steps=10 was given for total_steps=10", "pass fewer"):
        tokengate.SparsitySchedule(model, adam(model), 0.5, 10, warmup_steps=10)


class Now(nn.Module):
    """Two layers, of which the second is called now and then."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, both=True):
        return [layer(x) for layer in ([self.first, self.second] if both else [self.first])]


@pytest.mark.filterwarnings("ignore:.*'second' of Now was patched but never called")
@pytest.mark.parametrize("when", [lambda step: step % 3 == 2, lambda step: step > 149])
def test_what_is_called_in_few_steps_counts_like_what_is_called_in_all(when):
    """Its scores were next to nothing in the counts; or, of what came late, nearly all of them."""
    torch.manual_seed(0)
    model = tokengate.patch(Now(), "all-linear", rank=4)
    optimizer = adam(model)
    tokengate.SparsitySchedule(model, optimizer, 0.5, 200)
    goal = torch.randn(6, 6)
    for step in range(200):
        x = torch.randn(8, 10, 6)
        optimizer.zero_grad()
        sum((y - x @ goal).square().mean() for y in model(x, both=when(step))).backward()
        optimizer.step()
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model(torch.randn(100, 10, 6))
    shares = rec.report().by_module
    assert abs(shares["first"] - shares["second"]) > 0.1
    assert rec.report().sparsity == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
def test_a_copy_of_what_is_led_counts_for_nobody(gate, copied):
    model = away_from_initialisation(made(gate))
    schedule = tokengate.SparsitySchedule(model, adam(model), 0.5, 10)
    model(torch.randn(4, 5, 6)).sum().backward()
    twin = copied(model)
    assert not any(each.is_led or each.counts_scores for each in gates_of(twin))
    assert not any(value is not None for each in gates_of(twin) for value in counts_of(each))
    assert all(value.any() for each in gates_of(model) for value in counts_of(each))
    tokengate.SparsitySchedule(twin, adam(twin), 0.5, 10)
    schedule.detach()
    assert not any(value is not None for each in gates_of(model) for value in counts_of(each))
    assert not any(value.any() for each in gates_of(twin) for value in counts_of(each))


def counts_of(gate):
    return [gate._seen, *([gate._fed] if hasattr(gate, "_fed") else [])]


def test_a_copy_goes_its_own_pace_from_0():
    """Its own optimiser wants medians of its own steps."""
    model = away_from_initialisation(made())
    tokengate.param_groups(model, lr=1e-2, total_steps=10)
    model(torch.randn(4, 5, 6)).sum().backward()
    twin = copy.deepcopy(model)
    for each, other in zip(gates_of(model), gates_of(twin), strict=True):
        assert each._seen.sum() == pytest.approx(4)
        assert not other._seen.any()
    twin(torch.randn(3, 5, 6)).sum().backward()
    assert all(each._seen.sum() == pytest.approx(3) for each in gates_of(twin))


def test_what_is_tried_is_no_part_of_the_training():
    """suggest and fisher_scores compute losses and gradients, in evaluation mode."""
    model = away_from_initialisation(made("fisher"))
    tokengate.SparsitySchedule(model, adam(model), 0.5, 10)
    x = torch.randn(4, 5, 6)

    def loss(model, batch):
        return (model(batch) - batch[..., :3]).square().mean()

    tokengate.fisher_scores(model, [x], loss)
    tokengate.suggest(model, [x], loss=loss)
    assert not any(gate._seen.any() or gate._fed.any() for gate in gates_of(model))
    loss(model.eval(), x).backward()
    assert all(gate._seen.any() and gate._fed.any() for gate in gates_of(model))


@pytest.mark.parametrize("together", [True, False])
def test_layers_that_share_no_step_keep_their_size(together):
    """In units of each step alone both had a Q of the same size."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"large": nn.Linear(6, 3), "small": nn.Linear(6, 3)})
    tokengate.patch(model, "all-linear", rank=2, gate="fisher")
    away_from_initialisation(model)
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=1e-6))
    tokengate.SparsitySchedule(model, optimizer, 0.5, 40)
    for step in range(40):
        x = torch.randn(16, 5, 6)
        losses = [model["large"](x).square().mean(), 1e-4 * model["small"](x).square().mean()]
        # The first step has both.
        loss = sum(losses) if together or not step else losses[step % 2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sizes = {name: layer.gate.size.item() for name, layer in tokengate.layers(model).items()}
    assert sizes["large"] > 1e5 * sizes["small"] > 0


def test_who_trains_a_head_beside_a_frozen_adapter_is_told_of_nothing():
    model = away_from_initialisation(made("firm"))
    for layer in tokengate.layers(model).values():
        layer.gate.tau.fill_(0.1)
        layer.modification.requires_grad_(False)
    head = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        head(model(torch.randn(4, 5, 6))).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:SparsitySchedule was made for 10 steps")
def test_what_has_ended_holds_what_nobody_else_leads_also_when_resumed():
    model = made()
    optimizer = adam(model, s=1e-2)
    first = tokengate.SparsitySchedule(model, optimizer, 0.3, 10)
    train(model, optimizer, 12)
    state = first.state_dict()
    first.detach()
    resumed = tokengate.SparsitySchedule(model, optimizer, 0.3, 10)
    resumed.load_state_dict(state)
    tokengate.SparsitySchedule(model[2], optimizer, 0.6, 10, learn_from=0.5)
    train(model, optimizer, 6)
    before = [gate.tau.item() for gate in gates_of(model)]
    train(model, optimizer, 4)
    after = [gate.tau.item() for gate in gates_of(model)]
    assert before[0] == after[0]
    assert before[1] != after[1]
