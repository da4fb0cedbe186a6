"""A training that ends short of what its schedule was to close, or goes on after it, is told of."""

import warnings

import pytest
import torch
from torch import nn

import tokengate
from tokengate.errors import UnreachedSparsityWarning
from tokengate.training.leading.quantile_tracker import QuantileTracker
from tokengate.training.leading.unreached import LastSteps


def last_steps(offs, steps=40, level=24.0, weights=(1.0,)):
    last = LastSteps(steps, level, torch.device("cpu"))
    for step, off in enumerate(offs, steps - len(offs) + 1):
        off, weight = torch.tensor([off, weights[step % len(weights)]], dtype=torch.float64)
        last.add(step, off, weight)
    return last


def misses(*args, **options):
    return last_steps(*args, **options).miss()


def test_what_is_late_in_every_step_is_no_chance():
    assert misses([0.5] * 20 + [0.05, 0.06] * 4) == pytest.approx(0.055)  # of the last eight
    assert misses([-0.1] * 40, level=34.0) == pytest.approx(-0.1)
    assert misses([0.1, -0.09] * 20) == 0.0
    assert misses([0.1] * 40, level=37.0) == 0.0  # three steps tell nothing
    assert misses([0.1] * 100 + [0.0] * 100, steps=1000) == pytest.approx(0.0)
    assert misses([0.1] * 100, steps=1000) == pytest.approx(0.1)
    # A step in which few layers were called is as much less worth.
    assert misses([0.08, -0.04] * 20, weights=[0.0, 1.0]) == pytest.approx(0.08)
    assert misses([0.0] * 40, weights=[0.0]) == 0.0


def made(gate="threshold", steps=40, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    tokengate.patch(model, "all-linear", rank=4, gate=gate)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    return model, optimizer, tokengate.SparsitySchedule(model, optimizer, 0.5, steps, **options)


def train(model, optimizer, steps, dtype=torch.float32, batch=(32, 10)):
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(6, 3, generator=generator)
    for _ in range(steps):
        x = torch.randn(*batch, 6, generator=generator)
        optimizer.zero_grad()
        (model(x.to(dtype)) - (x @ goal).to(dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_thresholds_that_are_late_are_told_of(late, monkeypatch):
    """The scores of the steps before said that all was well: .45 was closed of .30, silently."""
    told_of = QuantileTracker.quantile
    monkeypatch.setattr(QuantileTracker, "quantile", lambda own, p: told_of(own, p) - late)
    monkeypatch.setattr(QuantileTracker, "share_below", lambda own, logs: torch.tensor(0.5))
    model, optimizer, schedule = made(settle=False)
    if not late:
        train(model, optimizer, 40)
        assert schedule.sparsity == pytest.approx(0.5, abs=0.05)
        return
    with pytest.warns(UnreachedSparsityWarning, match="to close 50% .* ended with [1-4]?[0-9]%"):
        train(model, optimizer, 40)
    assert schedule.sparsity < 0.45


def test_a_training_that_goes_on_is_told_of_once():
    model, optimizer, schedule = made()
    train(model, optimizer, 47)
    with pytest.warns(UnreachedSparsityWarning, match="for 40 steps, .* at step 48: its") as told:
        train(model, optimizer, 30)
    assert len(told) == 1
    model, optimizer, schedule = made()
    train(model, optimizer, 40)
    schedule.detach()
    train(model, optimizer, 30)


@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
def test_a_model_is_led_wherever_it_has_been_moved(gate):
    """Buffers were given new ones, of which the schedule knew nothing: nothing was ever closed."""
    closed = []
    for dtype in (torch.float32, torch.float64):
        model, optimizer, _ = made(gate)
        model.to(dtype)
        train(model, optimizer, 40, dtype)
        with torch.no_grad(), tokengate.record(model) as rec:
            model(torch.randn(64, 10, 6, generator=torch.Generator().manual_seed(1)).to(dtype))
        closed.append(rec.report().sparsity)
    assert closed[0] == pytest.approx(0.5, abs=0.1)
    assert closed[1] == pytest.approx(closed[0], abs=0.05)


def test_a_share_that_is_known_of_few_is_told_of_with_what_sets_it():
    """Of eight steps of one sample each nobody knows where that leaves others."""
    model, optimizer, _ = made(steps=8)
    said = r"that of other data to some \d+% .*calibrate\(model, .*=0.5, per_layer=False, warm_st"
    with pytest.warns(UnreachedSparsityWarning, match=said):
        train(model, optimizer, 8, batch=(1, 8))
    seen, unseen = torch.randn(2, 300, 10, 6)
    tokengate.calibrate(model, [seen], 0.5, per_layer=False, warm_start=True)
    with tokengate.record(model.eval()) as rec:
        model(unseen)
    assert rec.report().sparsity == pytest.approx(0.5, abs=0.01)


def test_many_small_steps_tell_what_one_does_not():
    """Each one's share goes up and down by a fifth; all together know it."""
    model, optimizer, schedule = made(steps=200)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(model, optimizer, 199, batch=(2, 8))
        before = abs(schedule.sparsity - 0.5)
        train(model, optimizer, 1, batch=(2, 8))
    assert not told
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model(torch.randn(300, 10, 6, generator=torch.Generator().manual_seed(1)))
    assert abs(rec.report().sparsity - 0.5) < 0.03 < before
