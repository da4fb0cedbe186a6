"""A training that ends short of what its schedule was to close, or goes on after it: it is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokengate.errors import UnreachedSparsityWarning
from tokengate.layers.patched import all_layers
from tokengate.sharding import local_part

if TYPE_CHECKING:
    from tokengate.training.leading.sparsity_schedule import SparsitySchedule

# How far from the target what is closed may be without a word.
_NEAR = 0.03
# How unsure it may be likewise, at two standard errors.
_UNSURE = 0.1
# How many standard errors of the mean are no chance.
_ERRORS = 3.0


class LastSteps:
    """How far what was closed in the last steps is from what was wanted, without a host wait.

    The thresholds of a step are told from the steps before it. Where one layer's scores move
    beside the others' they may be late, and then are so in step after step.

    Args:
        steps: of the training.
        level: the step from which on the wanted share stays as it is.
        device: of what is added.
    """

    def __init__(self, steps: int, level: float, device: torch.device) -> None:
        self._begin = max(steps - max(8, steps // 10), level)
        self._count = 0
        # Of w, w o, w^2, w^2 o and w^2 o^2, what a step weighs and how far it was off.
        self._sums = torch.zeros(5, device=device)

    def add(self, step: int, off: Tensor, weight: Tensor) -> None:
        """One step's, `()` both."""
        if step > self._begin:
            self._count += 1
            powers = torch.stack([torch.ones_like(off), off, off.square()])
            self._sums = self._sums + torch.cat([weight * powers[:2], weight.square() * powers])

    def miss(self) -> float:
        """The mean, or 0 where it may be chance."""
        weight, off, *squares = self._sums.tolist()
        if self._count < 4 or not weight:
            return 0.0
        mean = off / weight
        variance = max(0.0, squares[2] - 2 * mean * squares[1] + mean**2 * squares[0])
        error = (variance * self._count / (self._count - 1)) ** 0.5 / weight
        return mean if abs(mean) > _ERRORS * error else 0.0

    def closed(self, told: float, wanted: float) -> float:
        """The share that is closed in the end, `told` by the scores: as far off as it was lately.

        Unless these tell themselves that it is not what was wanted.
        """
        return told if abs(told - wanted) > _NEAR else told + self.miss()


def say_if_missed(schedule: SparsitySchedule, closed: float, error: float) -> None:
    """A warning if the share that is `closed` is not what was asked; or known with an `error`."""
    target = schedule.target
    if abs(closed - target) > _NEAR:
        found = f"ended with {closed:.0%}: {_calibrate(schedule)} comes nearer if a threshold can."
    elif error > _UNSURE:
        found = (
            f"did so of what its last steps were given, which tells that of other data to some "
            f"{error:.0%} alone: take larger steps, or more, or set the thresholds by more "
            f"positions, {_calibrate(schedule)}."
        )
    else:
        return
    warnings.warn(
        f"SparsitySchedule was to close {target:.0%} of the positions and {found}",
        UnreachedSparsityWarning,
        stacklevel=7,
    )


def _calibrate(schedule: SparsitySchedule) -> str:
    """What sets the thresholds to the target after training."""
    one = "" if schedule.per_layer else ", per_layer=False"
    return (
        f"tokengate.calibrate(model, batches, sparsity={schedule.target:g}{one}, warm_start=True)"
    )


def say_if_beyond(steps: int, last: int) -> None:
    """A warning in one of the steps after the last one: what the thresholds close changes."""
    if steps == last + max(8, last // 10):
        warnings.warn(
            f"SparsitySchedule was made for {last} steps, and the optimizer is at step {steps}: "
            "its thresholds stay, and close another share as M(x) goes on changing: make it for "
            "the steps of the whole training, total_steps=.",
            UnreachedSparsityWarning,
            stacklevel=7,
        )


def say_if_early(
    schedule: SparsitySchedule, step: int | None = None, closed: Iterable[float] = ()
) -> None:
    """A warning if the share that was wanted by then is not the target yet, or was not closed.

    Args:
        schedule: of a training that has ended.
        step: of which the model is, as of its best checkpoint; None for the last that was taken.
        closed: the share that this model closed, in each evaluation; the nearest counts.
    """
    target, taken = schedule.target, schedule.steps if step is None else step
    wanted = schedule.wanted_at(taken)
    found = min(closed, key=lambda share: abs(share - target), default=target)
    if abs(wanted - target) > _NEAR:
        said = (
            f"where {wanted:.0%} were to be: train to the end and keep a later one, ask for fewer "
            "steps, or call"
        )
    elif taken < schedule.total_steps and abs(found - target) > _NEAR:
        said = (
            f"which closed {found:.0%} when it was evaluated, as thresholds are followed until the "
            "last step and settled there alone: settle those of the model that is kept by"
        )
    else:
        return
    warnings.warn(
        f"a SparsitySchedule was to close {target:.0%} of the positions, and the model is that of "
        f"step {taken} of {schedule.total_steps}, {said} {_calibrate(schedule)}.",
        UnreachedSparsityWarning,
        stacklevel=3,
    )


def say_if_replaced(schedule: SparsitySchedule | None, model: nn.Module) -> None:
    """A warning if thresholds are others by now than those it has set last.

    A mean of a training's weights has a mean of its thresholds, most of which were to close less.

    Args:
        schedule: of a training that has ended, if it has one.
        model: what was trained.
    """
    if schedule is None:
        return
    patched = all_layers(model)
    for name, value in schedule.thresholds.items():
        gate = patched[name].gate if name in patched else None
        if gate is None or gate.threshold is None:
            continue
        own = local_part(gate.threshold.detach())
        if bool((own != own.new_tensor(value)).any()):
            warnings.warn(
                f"a SparsitySchedule was to close {schedule.target:.0%} of the positions, and "
                f"something has replaced its thresholds, e.g. that of {name!r}, after the last "
                "step, as what averages weights does: they close another share, so call "
                f"{_calibrate(schedule)}.",
                UnreachedSparsityWarning,
                stacklevel=3,
            )
            return
