"""What is found of an optimiser that somebody made: what it wraps and holds, and who steps it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tokengate.errors import TokenGateError
from tokengate.gates.optimizer_steps import nothing

#: What is said to whoever calls `step()` of what hooks itself into an optimiser.
NO_STEP = "{} was asked for a step(), which optimizer.step() takes along: leave the call out."


def hooked_in(optimizer: Any) -> Iterator[Optimizer]:
    """It, and what it wraps; without Accelerate's and Lightning's wrappers, which have no hooks."""
    seen: list[Any] = [optimizer]
    for each in seen:
        own = getattr(each, "__dict__", {})
        if isinstance(each, Optimizer) and "_optimizer_step_pre_hooks" in own:
            yield each
        for value in own.values():
            if isinstance(value, Optimizer) and not any(value is known for known in seen):
                seen.append(value)


def holders(
    taus: dict[str, nn.Parameter], optimizer: Any, inside: list[Optimizer]
) -> dict[nn.Parameter, Optimizer]:
    """Which optimiser holds a tau."""
    held = {id(p): each for each in inside for group in each.param_groups for p in group["params"]}
    found = {tau: held[id(tau)] for tau in taus.values() if id(tau) in held}
    # optimi's `gradient_release`: it computes with what it holds when a gradient comes, and keeps
    # states of the same names as Adam's.
    found = {tau: o for tau, o in found.items() if not o.defaults.get("gradient_release")}
    if found and (len(inside) > 1 or not isinstance(optimizer, Optimizer)):
        raise TokenGateError(
            f"follow was asked of {type(optimizer).__name__}, which wraps "
            f"{type(inside[-1]).__name__} and computes with taus itself: make that one without "
            "them, from tokengate.param_groups(model, lr)[:1]."
        )
    return found


def make_readable(held: dict[nn.Parameter, Optimizer]) -> None:
    """Groups of nothing but `held`, by which nothing is done any more, but which are still read."""
    for holder in {*held.values()}:
        for group in holder.param_groups:
            if all(p in held for p in group["params"]):
                group |= {k: holder.defaults[k] for k in other_numbers(holder, group)}


def other_numbers(optimizer: Optimizer, group: dict[str, Any]) -> list[str]:
    """Of which numbers of Adam's this optimiser wants more or fewer than `group` has."""
    wanted = {key: optimizer.defaults.get(key) for key in ("betas", "eps")}
    return [key for key, value in wanted.items() if key in group and _many(value, group[key])]


def _many(wanted: Any, found: Any) -> bool:
    several = isinstance(wanted, (tuple, list))
    return several and (not isinstance(found, (tuple, list)) or len(found) != len(wanted))


def loss_scale() -> float | None:
    """By what the GradScaler that takes this step has multiplied gradients it does not know of."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in ("_maybe_opt_step", "step"):
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler):
                return scaler.get_scale()
        frame = frame.f_back
    return None


class WithZeroGrad:
    """An optimiser's `zero_grad` calls `also`; no copy's does."""

    def __init__(self, optimizer: Optimizer, also: Callable[[], None]) -> None:
        self._optimizer, plain = optimizer, optimizer.zero_grad

        @functools.wraps(plain)
        def zero_grad(*args: Any, **kwargs: Any) -> None:
            plain(*args, **kwargs)
            self._also()

        self._also, self._before = also, vars(optimizer).get("zero_grad")
        self._own = vars(optimizer)["zero_grad"] = zero_grad

    def remove(self) -> None:
        """It does no more."""
        self._also = nothing
        if vars(self._optimizer).get("zero_grad") is self._own:
            del vars(self._optimizer)["zero_grad"]
            if self._before is not None:
                vars(self._optimizer)["zero_grad"] = self._before


class Follower(torch.optim.Adam):
    """Its steps train nothing by themselves: it is another's to tell what is not trained.

    They are a part of another's; or of a trial, after which all is put back.
    """

    follows = True
