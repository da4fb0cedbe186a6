"""A gradient of a gate that is not finite: skipped by every optimiser, counted, and said once."""

import copy
import math
import pickle

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation
from torch import nn, optim

import tokengate
from tokengate.errors import NonFiniteWarning

# Many of the optimisers here move tau by another rule than its own.
pytestmark = pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")

# Weight decay and momentum would move what has a gradient of 0.
OPTIMISERS = {
    "TauAdam": lambda model: tokengate.TauAdam([*taus_of(model)], s=1e-2),
    "AdamW": lambda model: optim.AdamW(groups(model)),
    "fused AdamW": lambda model: optim.AdamW(groups(model), fused=True),
    "one by one": lambda model: optim.Adam(groups(model), foreach=False),
    "SGD": lambda model: optim.SGD(groups(model), momentum=0.9),
    "Adagrad": lambda model: optim.Adagrad(model.parameters(), weight_decay=0.1),
    "RMSprop": lambda model: optim.RMSprop(model.parameters(), momentum=0.9),
}
BAD = [math.nan, math.inf, -math.inf]


def groups(model):
    own = tokengate.param_groups(model, lr=1e-2, s=1e-2)
    return [{k: v for k, v in group.items() if k in ("params", "lr")} for group in own]


def taus_of(model):
    return [layer.gate.tau for layer in tokengate.layers(model).values()]


def numbers(model):
    return [tau.item() for tau in taus_of(model)]


def made(gate="threshold"):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj", "v_proj"], gate=gate)
    return away_from_initialisation(model, 0.3)


def backward(model, step=0):
    generator = torch.Generator().manual_seed(step)
    loss = model(torch.randn(2, 5, 8, generator=generator)).square().mean()
    loss.backward()
    return loss


def steps_of(optimizer, model, broken=(), bad=math.nan, count=4):
    """Steps, in some of which the first tau's gradient is `bad`; where the taus were after each."""
    path = []
    for step in range(count):
        optimizer.zero_grad()
        backward(model, step)
        if step in broken:
            taus_of(model)[0].grad.fill_(bad)
        optimizer.step()
        path.append(numbers(model))
    return torch.tensor(path)


@pytest.mark.filterwarnings("ignore::tokengate.errors.LeftOutWarning")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_one_bad_gradient_moves_nothing_and_is_counted(kind, bad):
    model = made()
    optimizer = OPTIMISERS[kind](model)
    with pytest.warns(NonFiniteWarning, match="1 of the 4 gates .* not finite"):
        path = steps_of(optimizer, model, {1}, bad)
    moves = path.diff(dim=0) != 0
    assert path.isfinite().all()
    assert moves[:, 1:].all()
    assert moves[:, 0].tolist() == [False, True, True]
    gates = [layer.gate for layer in tokengate.layers(model).values()]
    assert [gate.skipped for gate in gates] == [1, 0, 0, 0]
    assert all(p.isfinite().all() for p in model.parameters())


@settings(max_examples=many(20), deadline=None)
@given(broken=st.sets(st.integers(0, 7)), bad=st.sampled_from(BAD))
@pytest.mark.filterwarnings("ignore::tokengate.errors.NonFiniteWarning")
@pytest.mark.filterwarnings("ignore::tokengate.errors.LeftOutWarning")
def test_the_first_tau_goes_as_if_the_bad_steps_had_not_been(broken, bad):
    """The others are frozen here, so that the losses are those of the good steps alone."""
    ends = []
    for skipped in (True, False):
        model = made()
        optimizer = tokengate.TauAdam(taus_of(model)[:1], s=1e-2)
        for step in range(8):
            optimizer.zero_grad()
            backward(model, step)
            if step in broken and skipped:
                taus_of(model)[0].grad.fill_(bad)
            if step not in broken or skipped:
                optimizer.step()
        ends.append(numbers(model)[0])
    assert ends[0] == ends[1]


def test_it_is_said_once_for_all_gates_of_an_optimiser():
    model = made()
    optimizer = OPTIMISERS["SGD"](model)

    def three_steps():
        for which in (0, 1, 0):
            backward(model)
            taus_of(model)[which].grad.fill_(math.nan)
            optimizer.step()

    with pytest.warns(NonFiniteWarning) as said:
        three_steps()
    (only,) = [warning for warning in said if issubclass(warning.category, NonFiniteWarning)]
    assert only.filename == __file__
    assert [layer.gate.skipped for layer in tokengate.layers(model).values()] == [2, 1, 0, 0]


def test_a_bad_micro_batch_spoils_its_step_alone():
    model = made()
    optimizer = OPTIMISERS["AdamW"](model)
    before = numbers(model)
    for micro in range(3):
        backward(model, micro)
        if micro == 1:
            taus_of(model)[0].grad.fill_(math.inf)
    with pytest.warns(NonFiniteWarning):
        optimizer.step()
    assert numbers(model)[0] == before[0]
    assert numbers(model)[1] != before[1]
    optimizer.zero_grad()
    steps_of(optimizer, model, count=1)
    assert numbers(model)[0] != before[0]


@pytest.mark.parametrize("kind", ["SGD", "LBFGS"])
def test_gradients_that_a_closure_makes_within_the_step(kind):
    """As Lightning does in every step."""
    for by_keyword in (True, False):
        model = made()
        lbfgs = optim.LBFGS(model.parameters(), max_iter=3)
        optimizer = lbfgs if kind == "LBFGS" else OPTIMISERS[kind](model)
        before = numbers(model)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = backward(model)
            taus_of(model)[0].grad.fill_(math.nan)
            return loss

        with pytest.warns(NonFiniteWarning):
            loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert loss > 0
        assert numbers(model)[0] == before[0]
        assert numbers(model)[1] != before[1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_sees_what_overflows_and_skips_the_step_itself(fused):
    model = made()
    optimizer = optim.AdamW(groups(model), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for broken, scale in ((False, 1024.0), (True, 512.0), (False, 512.0)):
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(2, 5, 8)).square().mean()).backward()
        if broken:
            taus_of(model)[0].grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        after = [p for p in model.parameters() if p.requires_grad]
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(same) if broken else not any(same)
        assert scaler.get_scale() == scale
    assert sum(layer.gate.skipped for layer in tokengate.layers(model).values()) == 0


def test_copies_are_watched_too():
    for copied in (copy.deepcopy(made()), pickle.loads(pickle.dumps(made()))):
        optimizer = OPTIMISERS["SGD"](copied)
        with pytest.warns(NonFiniteWarning):
            assert steps_of(optimizer, copied, {0}).isfinite().all()
        assert copied.blocks[0].q_proj.gate.skipped == 1


def test_all_that_a_gate_trains():
    model = made("sigmoid")
    gate = model.blocks[0].q_proj.gate
    optimizer = optim.SGD(tokengate.param_groups(model, lr=0.1))
    optimizer.zero_grad()
    backward(model)
    gate.v.grad[3] = math.nan
    v, c = gate.v.clone(), gate.c.clone()
    with pytest.warns(NonFiniteWarning):
        optimizer.step()
    assert torch.equal(gate.v, v)
    assert not torch.equal(gate.c, c)
    assert gate.skipped == 1


def test_a_sigmoid_gate_with_a_nan_is_open_as_every_gate_is():
    model = made("sigmoid").eval()
    with torch.no_grad():
        model.blocks[0].q_proj.gate.c.fill_(math.nan)
    with tokengate.record(model) as rec:
        model(torch.randn(2, 5, 8))
    assert set(rec.report().by_module.values()) == {0.0}


def test_others_parameters_are_the_optimisers_own_affair():
    """Only a gate breaks without a trace in the loss."""
    model = made()
    optimizer = OPTIMISERS["SGD"](model)
    backward(model)
    model.blocks[0].q_proj.modification.A.grad.fill_(math.nan)
    optimizer.step()
    assert model.blocks[0].q_proj.modification.A.isnan().all()
    other = nn.Linear(2, 2)
    elsewhere = optim.SGD(other.parameters(), lr=0.1)
    backward(model)
    taus_of(model)[0].grad.fill_(math.nan)
    other(torch.ones(1, 2)).sum().backward()
    elsewhere.step()  # which does not move the model's taus, and leaves their gradients alone
    assert taus_of(model)[0].grad.isnan().all()


def test_compiled():
    model = made()
    optimizer = OPTIMISERS["AdamW"](model)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for broken in (False, True, False):
        backward(model)
        before = numbers(model)
        if broken:
            taus_of(model)[0].grad.fill_(math.nan)
            with pytest.warns(NonFiniteWarning):
                step()
        else:
            step()
        assert all(map(math.isfinite, numbers(model)))
        assert (numbers(model)[0] == before[0]) is broken
        optimizer.zero_grad()


def test_a_training_without_it_would_lose_tau(monkeypatch):
    monkeypatch.setattr("tokengate.gates.skipped_gradients._skip", lambda optimizer: None)
    model = made()
    steps_of(OPTIMISERS["AdamW"](model), model, {1})
    assert math.isnan(numbers(model)[0])
