"""Where in an optimiser's step its gradients are there: before it, or within, from its closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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


def is_part(optimizer: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it is no whole step: of one parameter in backward, or of the taus in another's."""
    return kwargs.get("param") is not None or getattr(optimizer, "follows", False)
