"""Activation checkpointing: a forward that is computed again in backward needs its own masks again.

By then the module that received the mask has long returned, and other forwards may have run in
between. But what is computed again is the same to the bit, so a few numbers of a layer's input tell
which forward it belongs to.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_Told = TypeVar("_Told")

# Forwards that may wait for their backward at a time, as in a pipeline; and of each how many
# positions, about, and numbers of a position tell it from others.
_WAITING, _POSITIONS, _CHANNELS = 32, 256, 2
_TRIAL: ContextVar[bool] = ContextVar("tokengate_trial", default=False)
_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


@dataclass
class _Call:
    shape: torch.Size
    sample: Tensor
    told: Any
    recalled: bool = False


class MaskMemory:
    """What one layer's checkpointed calls were told, until they are computed again."""

    def __init__(self) -> None:
        self._calls: tuple[_Call, ...] = ()
        self._lock = threading.Lock()  # threads may share a layer

    def settle(self, x: Tensor, told: _Told) -> _Told:
        """What the call with input `x` was told: `told`, or in backward what it was in forward."""
        if torch.compiler.is_compiling():
            return told
        if is_computed_again():
            return self._recall(x, told)
        if _in_checkpoint() and not x.is_nested:
            # Not before: a graph that is kept is computed again for every backward.
            call = _Call(x.shape, _sample(x).clone(), told)
            with self._lock:
                waiting = [each for each in self._calls if not each.recalled][1 - _WAITING :]
                self._calls = (*waiting, call)
        return told

    def _recall(self, x: Tensor, told: _Told) -> _Told:
        calls = [call for call in reversed(self._calls) if call.shape == x.shape]
        if not calls:
            return told
        best = 0
        if len(calls) > 1:
            distances = [(call.sample - _sample(x)).abs().float().sum() for call in calls]
            least = torch.stack(distances).min()
            # Of calls with equal inputs, as backward comes to them: the last first, each once.
            alike = [i for i, distance in enumerate(distances) if distance == least]
            best = next((i for i in alike if not calls[i].recalled), alike[0] if alike else 0)
        calls[best].recalled = True
        found: _Told = calls[best].told
        return found

    def __reduce__(self) -> tuple[type[MaskMemory], tuple[()]]:
        return MaskMemory, ()


def _sample(x: Tensor) -> Tensor:
    every = max(1, x[..., 0].numel() // _POSITIONS)
    x = x.detach()
    return x[..., ::every, :_CHANNELS] if x.dim() > 1 else x[:_CHANNELS]


def is_computed_again() -> bool:
    """Whether what runs now was computed before, and is again for a backward.

    That is done by the backward of a function, or where saved tensors are unpacked.
    """
    frame = sys._getframe(1) if _in_backward() else None
    while frame is not None:
        if frame.f_code is _BACKWARD or frame.f_code.co_name == "unpack_hook":
            return True
        frame = frame.f_back
    return False


def is_in_hook() -> bool:
    """Whether what runs now is computed in backward for the first time, with a backward of its own.

    So do losses that keep embeddings alone of their forward (GradCache; sentence-transformers'
    `Cached...`): they compute without gradients at first, and again in a hook.
    """
    return _in_backward() and is_learnt_from()


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def is_learnt_from() -> bool:
    """Whether a backward may come through what is computed now, and it is not computed again.

    A training step has more than that: texts that are generated to be learnt from afterwards, the
    answers of a reference model.
    """
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    if is_computed_again() or is_trial():
        return False
    return torch.is_grad_enabled() or _in_reentrant_checkpoint()


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """Within this context what is computed is part of no training, gradients or not."""
    before = _TRIAL.set(True)
    try:
        yield
    finally:
        _TRIAL.reset(before)


def is_trial() -> bool:
    """Whether what is computed now is part of no training."""
    return not torch.compiler.is_compiling() and _TRIAL.get()


def _in_checkpoint() -> bool:
    """Whether what is computed now may be computed again: always, where torch does not tell."""
    if not torch.is_grad_enabled():
        return _in_reentrant_checkpoint()
    return _hooks is None or _hooks(True) is not None


def _in_reentrant_checkpoint() -> bool:
    """Whether a checkpoint of the reentrant kind runs, which computes without a graph at first.

    Nothing but the stack tells it from other code without gradients: an evaluation, a reference
    model. It is a function of autograd, torch's own or another's, whose forward is given a `ctx`.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        runs = code.co_name == "forward" and code.co_varnames[:1] == ("ctx",)
        # One without gradients around it, or of inputs that want none, has nowhere to pass any on
        # to, and computes nothing again.
        if runs and getattr(frame.f_locals.get("ctx"), "next_functions", False):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
