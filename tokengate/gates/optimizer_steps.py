"""Who watches the steps of all optimisers; and where in a step its gradients are there.

That is before it, or within, from its closure. They are called for every step of every optimiser,
also of those that have nothing to do with gates: so all of them by one hook.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Watcher = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any]

_BEFORE: list[Watcher] = []
_AFTER: list[Watcher] = []


def watch_steps(before: Watcher | None = None, after: Watcher | None = None) -> None:
    """Have them called before and after the steps of all optimisers, as torch's hooks are."""
    _BEFORE.extend([] if before is None else [before])
    _AFTER.extend([] if after is None else [after])


# Left out of graphs, which warn of nothing and could keep no count.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    changed = None
    for watch in _BEFORE:
        found = watch(optimizer, args, kwargs)
        if found is not None:
            changed = args, kwargs = found
    return changed


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for watch in _AFTER:
        watch(optimizer, args, kwargs)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def nothing() -> None:
    """Do nothing."""


def once_there_are_gradients(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    look: Callable[[], None],
    before: Callable[[], None] = nothing,
) -> Arguments | None:
    """What a step pre-hook, called with `args` and `kwargs`, returns so that `look` is called.

    At once if the step has no closure; else after each time that the closure was called, and
    `before` before each.
    """
    # The optimiser itself stands first among the arguments of its step.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        look()
        return None

    def compute() -> Any:
        before()
        loss = closure()
        look()
        return loss

    if len(args) > 1:
        return (args[0], compute, *args[2:]), kwargs
    return args, {**kwargs, "closure": compute}


def is_infinite(optimizer: Any) -> bool:
    """Whether a GradScaler has found a gradient that is; it steps fused optimisers all the same."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf > 0)


# What torch makes of every `step`, which announces it.
_ANNOUNCED = Optimizer.profile_hook_step(nothing).__code__


def is_part(optimizer: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it is no whole step.

    But of one parameter in backward, of the taus in another's, or of the parent class in that of a
    class of somebody's own, which is announced twice.
    """
    if kwargs.get("param") is not None or getattr(optimizer, "follows", False):
        return True
    announced = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _ANNOUNCED and frame.f_locals.get("self") is optimizer:
            announced += 1
        frame = frame.f_back
    return announced > 1
