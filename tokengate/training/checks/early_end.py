"""A training that ended before its schedule had closed what was asked, as by early stopping."""

from __future__ import annotations

import warnings

from tokengate.errors import UnreachedSparsityWarning
from tokengate.training.leading.sparsity_schedule import SparsitySchedule

# How far from the target is not worth a word.
_NEAR = 0.03


def say_if_early(schedule: SparsitySchedule | None, step: int | None = None) -> None:
    """A warning if the share that was wanted by then is not the target yet.

    Args:
        schedule: of a training that has ended, if it has one.
        step: of which the model is, as of its best checkpoint; None for the last that was taken.
    """
    if schedule is None:
        return
    step = schedule.steps if step is None else step
    wanted = schedule.wanted_at(step)
    if abs(wanted - schedule.target) > _NEAR:
        warnings.warn(
            f"a SparsitySchedule was to close {schedule.target:.0%} of the positions, and the "
            f"model is that of step {step} of {schedule.total_steps}, where {wanted:.0%} were to "
            "be: train to the end and keep a later one, ask for fewer steps, or call "
            f"tokengate.calibrate(model, batches, sparsity={schedule.target:g}).",
            UnreachedSparsityWarning,
            stacklevel=3,
        )
