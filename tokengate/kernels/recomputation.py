"""Activation checkpointing: a forward that is computed again in backward needs its own masks again.

By then the module that received the mask has long returned, and other forwards may have run in
between. But what is computed again is the same to the bit, so a few numbers of a layer's input tell
which forward it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Forwards that may wait for their backward at a time, as in a pipeline; and numbers for a position.
_WAITING, _CHANNELS = 32, 2


@dataclass
class _Call:
    shape: torch.Size
    sample: Tensor  # (..., _CHANNELS) of the input
    told: tuple[Tensor | None, ...]
    recalled: bool = False


class MaskMemory:
    """What one layer's checkpointed calls were told, until they are computed again."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def settle(self, keep: bool, x: Tensor, *told: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the call with input `x` was told: `told`, or in backward what it was in forward.

        `keep` says whether that is worth remembering.
        """
        if torch.compiler.is_compiling():
            return told
        if in_backward():
            return self._recall(x, told)
        if keep and _in_checkpoint():
            # Not before: a graph that is kept is computed again for every backward.
            self._calls = [call for call in self._calls if not call.recalled][1 - _WAITING :]
            sample = x.detach()[..., :_CHANNELS].clone()
            self._calls.append(_Call(x.shape, sample, told))
        return told

    def _recall(self, x: Tensor, told: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        calls = [call for call in reversed(self._calls) if call.shape == x.shape]
        if not calls:
            return told
        best = 0
        if any(a is not b for call in calls for a, b in zip(call.told, calls[0].told, strict=True)):
            sample = x.detach()[..., :_CHANNELS]
            distances = [(call.sample - sample).abs().float().sum() for call in calls]
            least = torch.stack(distances).min()
            # Of calls with equal inputs, as backward comes to them: the last first, each once.
            alike = [i for i, distance in enumerate(distances) if distance == least]
            best = next((i for i in alike if not calls[i].recalled), alike[0] if alike else 0)
        calls[best].recalled = True
        return calls[best].told

    def __reduce__(self) -> tuple[type[MaskMemory], tuple[()]]:
        return MaskMemory, ()


def in_backward() -> bool:
    """Whether what runs now runs in a backward: in a forward, that it is computed again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _in_checkpoint() -> bool:
    """Whether what is computed now may be computed again: always, where torch does not tell."""
    if not torch.is_grad_enabled():  # the reentrant kind computes without a graph at first
        return True
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None
