"""A training that a schedule leads ends once and whole, also where it is interrupted or resumed."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from led_trainings import STEPS, Net, is_led, made, thresholds, train
from models import one_sentence

import tokengate
from tokengate.errors import UnreachedSparsityWarning
from tokengate.layers.following import HEARERS
from tokengate.training.leading.last_calls import LEAST

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_that_is_not_called_so_in_evaluation():
    said = r"again, in evaluation, .* failed \(ValueError: 'targets are wanted'\), .* settle=False"
    with pytest.warns(UnreachedSparsityWarning, match=said):
        found = thresholds(make=Untold)
    assert found == thresholds(make=Untold, settle=False)


class Untold(Net):
    """It is called in training alone."""

    problem = ValueError("targets are wanted")

    def forward(self, x):
        if not self.training:
            raise self.problem
        return super().forward(x)


@pytest.mark.parametrize("problem", [Untold.problem, KeyboardInterrupt()])
def test_it_has_ended_whatever_becomes_of_it(problem, monkeypatch):
    """Also in a program whose warnings are errors; its thresholds are those that it followed."""
    monkeypatch.setattr(Untold, "problem", problem)
    model, optimizer, schedule = made(Untold)
    with pytest.raises((UnreachedSparsityWarning, KeyboardInterrupt)):
        train(model, optimizer, lambda model, x, step: model(x))
    assert not is_led(model)
    assert schedule._calls not in HEARERS
    assert all(module.training for module in model.modules())
    assert list(schedule.thresholds.values()) == thresholds(settle=False)


def test_it_is_said_of_the_user_s_step():
    for model, optimizer, _ in (made(Untold), made(steps=LEAST - 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(model, optimizer, lambda model, x, step: model(x))
        assert {each.filename for each in said} == {train.__code__.co_filename}


def test_a_last_step_that_fails_is_taken_again(monkeypatch):
    model, optimizer, schedule = made()
    train(model, optimizer, lambda model, x, step: model(x), STEPS - 1)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_init_group", None)
        with pytest.raises(TypeError):
            train(model, optimizer, lambda model, x, step: model(x), begin=STEPS - 1)
    assert is_led(model)
    train(model, optimizer, lambda model, x, step: model(x), begin=STEPS - 1)
    assert not is_led(model)
    assert schedule._calls not in HEARERS


def test_what_else_is_done_in_a_step_comes_before():
    """An allocator takes back what Adam makes of what it has taken out, made before or after."""

    def thresholds(first):
        torch.manual_seed(0)
        model = tokengate.patch(Net(), "all-linear", method="adalora", rank=8, target_rank=6)
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
        makers = [
            lambda: tokengate.RankAllocator(model, optimizer, total_steps=STEPS),
            lambda: tokengate.SparsitySchedule(model, optimizer, 0.5, STEPS),
        ]
        made = {first: makers[first](), 1 - first: makers[1 - first]()}
        train(model, optimizer, lambda model, x, step: model(x))
        return made[1].thresholds

    assert thresholds(0) == thresholds(1)


def resumed(settle=True, saved=True):
    """From step 16 on; of a training that was `saved` with calls or not."""
    model, optimizer, schedule = made(settle=saved)
    train(model, optimizer, lambda model, x, step: model(x), 16)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (model, optimizer, schedule)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = made(settle=settle)
    for each, state in zip(again, states, strict=True):
        each.load_state_dict(state)
    train(*again[:2], lambda model, x, step: model(x), begin=16)
    return list(again[2].thresholds.values())


def test_a_resumed_training_ends_as_one_that_went_on():
    assert resumed() == thresholds()
    assert resumed(settle=False) == resumed(settle=False, saved=False) == thresholds(settle=False)
    # Of 8 of its own, which are enough.
    assert resumed(saved=False) not in (thresholds(), thresholds(settle=False))


def test_a_resumed_training_does_not_call_again_what_was_restricted_before():
    """It would be without the restriction, of which no state knows."""
    mask = (torch.arange(10) < 5).expand(16, -1)

    def restricted(model, x, step):
        with tokengate.restrict(model, mask):
            return model(x)

    kept = []
    for call in (restricted, lambda model, x, step: model(x)):
        model, optimizer, schedule = made()
        train(model, optimizer, call, 16)
        kept.append(len(schedule.state_dict()["calls"]["steps"]))
    assert kept == [0, 16]


@pytest.mark.parametrize("options", [{}, {"settle": False}, {"learn_from": 0.8}])
def test_a_training_that_goes_back_from_its_end_ends_as_before(options):
    """As after a loss that went up, in the same process."""
    parts = made(**options)
    model, optimizer, schedule = parts

    def call(model, x, step):
        return model(x)

    train(model, optimizer, call, 16)
    states = copy.deepcopy([each.state_dict() for each in parts])
    ends = []
    for _ in range(3):
        train(model, optimizer, call, begin=16)
        assert not is_led(model)
        ends.append((schedule.thresholds, schedule.steps))
        for each, state in zip(parts, states, strict=True):
            each.load_state_dict(copy.deepcopy(state))  # Adam goes on in what it is given
        assert is_led(model)
    assert ends[0] == ends[1] == ends[2]
    train(model, optimizer, call, begin=16)
    tokengate.SparsitySchedule(model, optimizer, 0.5, STEPS)
    with one_sentence("has a SparsitySchedule already"):
        schedule.load_state_dict(states[2])
    assert (schedule.thresholds, schedule.steps) == ends[0]


def test_a_training_that_ends_before():
    """As one of whose steps a GradScaler skipped some; a target that is not wanted yet is none."""
    model, optimizer, schedule = made(steps=STEPS + 2)
    train(model, optimizer, lambda model, x, step: model(x))
    followed = schedule.thresholds
    schedule.end()
    settled = schedule.thresholds
    assert (settled != followed, is_led(model)) == (True, False)
    schedule.end()
    train(model, optimizer, lambda model, x, step: model(x), 2)
    assert schedule.thresholds == settled
    other = tokengate.SparsitySchedule(model, optimizer, 0.3, STEPS)
    with one_sentence("has a SparsitySchedule already"):  # also with a state from its end
        schedule.load_state_dict({**schedule.state_dict(), "step": STEPS + 2})
    other.detach()
    model, optimizer, schedule = made(steps=2 * STEPS)
    train(model, optimizer, lambda model, x, step: model(x))
    schedule.end()
    assert is_led(model)
    model, optimizer, schedule = made(steps=4 * STEPS)
    train(model, optimizer, lambda model, x, step: model(x))
    said = r"close 50% of .* step 24 of 96, where 40% were to be"
    with pytest.warns(UnreachedSparsityWarning, match=said) as told:
        schedule.end()
    assert [each.filename for each in told] == [__file__]


def test_what_is_loaded_of_another_model_breaks_nothing():
    model, optimizer, schedule = made()
    train(model, optimizer, lambda model, x, step: model(x), 16)
    schedule._calls._steps[0][0].module = "another"
    states = [each.state_dict() for each in (model, optimizer, schedule)]
    again = made()
    for each, state in zip(again, states, strict=True):
        each.load_state_dict(state)
    with pytest.warns(UnreachedSparsityWarning, match=r"failed \(KeyError: .*another"):
        train(*again[:2], lambda model, x, step: model(x), begin=16)
    assert not is_led(again[0])


@pytest.mark.parametrize("how", ["ended", "detached", "handed over"])
def test_no_optimiser_keeps_a_model_alive(how):
    model, optimizer, schedule = made(learn_from=0.9 if how == "handed over" else None)
    train(model, optimizer, lambda model, x, step: model(x), STEPS if how != "detached" else 12)
    if how == "detached":
        schedule.detach()
    known = [weakref.ref(each) for each in (model, schedule)]
    del model, schedule
    gc.collect()
    assert [each() for each in known] == [None, None]
    optimizer.step()


def test_its_end_is_kept_without_it():
    """As in a loop that never held it: thresholds stay, and what goes on is told of, once."""
    model, optimizer, schedule = made()
    train(model, optimizer, lambda model, x, step: model(x))
    found = schedule.thresholds
    del schedule
    gc.collect()
    with pytest.warns(UnreachedSparsityWarning, match=f"for {STEPS} steps, .* step 32") as told:
        train(model, optimizer, lambda model, x, step: model(x), 20)
    assert [each.filename for each in told] == [train.__code__.co_filename]
    layers = tokengate.layers(model)
    assert {name: layer.gate.tau.item() for name, layer in layers.items()} == pytest.approx(found)


def test_what_was_detached_keeps_no_calls():
    model, optimizer, schedule = made()
    train(model, optimizer, lambda model, x, step: model(x), 16)
    assert schedule._calls in HEARERS
    schedule.detach()
    assert schedule._calls not in HEARERS
