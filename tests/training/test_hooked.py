"""What has hooked itself into an optimiser leads nothing once detached or copied: it is said."""

import copy
import pickle
import warnings

import pytest
import torch
from models import Net, one_sentence

import tokengate
from tokengate.errors import LeftOutWarning, UselessGateWarning

MAKE = {
    "SparsitySchedule": lambda model, optimizer: tokengate.SparsitySchedule(
        model, optimizer, 0.5, 20
    ),
    "RankAllocator": lambda model, optimizer: tokengate.RankAllocator(
        model, optimizer, total_steps=20
    ),
    "Following": lambda model, optimizer: tokengate.follow(model, optimizer),
}


def made(name):
    torch.manual_seed(0)
    own = {"method": "adalora", "target_rank": 2} if name == "RankAllocator" else {}
    model = tokengate.patch(Net(), ["fc1"], rank=4, **own)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    leader = MAKE[name](model, optimizer)
    train(model, optimizer)
    return model, optimizer, leader


def train(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5, 8)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", MAKE)
def test_what_is_detached_takes_no_state(name):
    model, optimizer, leader = made(name)
    state = copy.deepcopy(leader.state_dict())
    leader.load_state_dict(state)
    leader.detach()
    with one_sentence(f"a {name} that is detached", "make a new one"):
        leader.load_state_dict(state)
    MAKE[name](model, optimizer).load_state_dict(state)


@pytest.mark.parametrize("name", MAKE)
def test_a_copy_leads_nothing_and_says_so(name):
    model, optimizer, leader = made(name)
    with pytest.warns(LeftOutWarning, match=f"a {name} was copied, and its copy leads nothing"):
        other = copy.deepcopy([model, optimizer, leader])
    state = copy.deepcopy(leader.state_dict())
    with one_sentence(f"a {name} that is detached, or the copy of one"):
        other[2].load_state_dict(state)
    again = MAKE[name](*other[:2])
    again.load_state_dict(state)
    for each in ([model, optimizer], other[:2]):
        torch.manual_seed(1)
        train(*each)
    ours, theirs = model.state_dict(), other[0].state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert any(not torch.equal(value, state) for value, state in zip(
        ours.values(), made(name)[0].state_dict().values(), strict=True
    ))  # fmt: skip
    other[2].detach()
    leader.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(leader)


def test_copies_of_led_gates_that_are_trained_are_told_of():
    """As where nobody holds the schedule: the optimizer's hook has it, and goes in no copy."""
    model, optimizer, schedule = made("SparsitySchedule")
    for copied in (copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))):
        other = copied(copied([model, optimizer]))
        train(*other)
        train(*other)
        with pytest.warns(UselessGateWarning, match=r"2 gates, .* copies of ones that a Sparsity"):
            train(*other)
        train(*other)
    led = copy.deepcopy([model, optimizer])
    again = MAKE["SparsitySchedule"](*led)
    again.detach()
    for _ in range(3):
        train(*led)
    schedule.detach()
    free = copy.deepcopy([model, optimizer])
    for _ in range(3):
        train(*free)


@pytest.mark.parametrize("name", MAKE)
def test_it_is_not_pickled(name):
    with one_sentence(f"a {name} was to be pickled", "state_dict()"):
        pickle.dumps(made(name)[2])


def test_gates_that_were_taken_out_take_no_state():
    model, _, schedule = made("SparsitySchedule")
    state = schedule.state_dict()
    tokengate.unpatch(model)
    with one_sentence("whose gate of 'blocks.0.fc1' is in this Net no more", "detach() it"):
        schedule.load_state_dict(state)
    tokengate.patch(model, ["fc1"], rank=4)
    with one_sentence("whose gate of 'blocks.0.fc1' is in this Net no more"):
        schedule.load_state_dict(state)
    assert schedule.steps == 3


@pytest.mark.parametrize("name", ["total_steps", "per_layer", "steps"])
def test_what_a_schedule_was_made_with_is_not_written_over(name):
    """It was to no effect, as where a training is made longer."""
    schedule = made("SparsitySchedule")[2]
    with pytest.raises(AttributeError, match=f"'{name}' of 'SparsitySchedule'"):
        setattr(schedule, name, 40)
