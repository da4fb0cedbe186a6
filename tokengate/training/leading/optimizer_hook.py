"""What an optimiser has of a schedule, while that leads and after its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from tokengate.gates.base import Gate
from tokengate.gates.optimizer_steps import (
    Arguments,
    is_infinite,
    is_part,
    once_there_are_gradients,
)
from tokengate.training.hooked import Hooked
from tokengate.training.leading.unreached import say_if_beyond

if TYPE_CHECKING:
    from tokengate.training.leading.sparsity_schedule import SparsitySchedule

# All that are alive.
_HOOKS: WeakSet[OptimizerHook] = WeakSet()


class OptimizerHook(Hooked):
    """Counts the steps of an optimiser, tells the schedule of them, and holds thresholds.

    It knows gates weakly, and the schedule until that ends, so that no optimiser keeps a model
    alive.

    Args:
        optimizer: whose steps.
        schedule: that is told.
        gates: whose thresholds the optimiser does not touch; no other schedule's hook holds them.

    Attributes:
        steps: that were begun.
        schedule: None where it does not lead.
    """

    called = "SparsitySchedule"

    def __init__(
        self, optimizer: Optimizer, schedule: SparsitySchedule, gates: Iterable[Gate]
    ) -> None:
        self.steps = 0
        self.schedule: SparsitySchedule | None = None
        self._last = 0  # the step in which it has ended
        self._held: WeakSet[Gate] = WeakSet()
        _HOOKS.add(self)
        self.begin(schedule, gates)
        self._hooks = [optimizer.register_step_pre_hook(self._before_step)]
        # Before what takes tau's gradient out of the optimiser's sight.
        hooks: Any = optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(self._hooks[0].id, last=False)

    def begin(self, schedule: SparsitySchedule, gates: Iterable[Gate]) -> None:
        """The schedule leads, and the thresholds of `gates` are held here and nowhere else."""
        held = WeakSet(gates)
        for other in list(_HOOKS):
            other._held.difference_update(held)
        self.schedule, self._held = schedule, held

    def after_this_step(self, optimizer: Optimizer) -> None:
        """Let the schedule settle; only now, to come after whatever else changes the model then."""
        for handle in self._hooks[1:]:  # of an end that a training went back from
            handle.remove()
        self._hooks[1:] = [optimizer.register_step_post_hook(self._after_step)]

    def end(self, last: int, holds: bool) -> None:
        """The schedule has ended, in step `last`; its thresholds stay, or are learned from here."""
        self.schedule, self._last = None, last
        if not holds:
            self._held.clear()

    # Left out of graphs, as is what comes after a step: what it does changes from step to step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if is_part(optimizer, kwargs):
            return None
        step = self.steps

        def look() -> None:
            # Of a closure's calls the first counts, and the others in no other step.
            if self.steps == step and not is_infinite(optimizer):
                self.steps += 1
                if self.schedule is not None:
                    self.schedule._look(optimizer)
                elif self._held:
                    say_if_beyond(self.steps, self._last)
            elif self.schedule is not None:
                self.schedule.skip_step()
            for threshold in (gate.threshold for gate in self._held):
                if threshold is not None:
                    threshold.grad = None  # no optimiser touches a parameter without a gradient

        return once_there_are_gradients(args, kwargs, look)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """After the last one the thresholds are set that stay: the model is what it will be."""
        schedule = self.schedule
        if schedule and self.steps >= schedule._last and not is_part(optimizer, kwargs):
            schedule._settle()
