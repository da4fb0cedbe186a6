"""Trainable parameters keep float32 when their model goes to 16 bits or fewer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_nothing = contextlib.nullcontext()


def trainable_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of what is trained beside `weight`: float32, or float64 for a float64 base."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def finest_dtype(device: torch.device) -> torch.dtype:
    """What has the most digits there: float64, or float32 on MPS, which counts to 2^24 exactly."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within this context what is computed keeps the dtypes that were chosen for it."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return _nothing


def autocasts(device: torch.device) -> bool:
    """Whether autocast chooses dtypes on `device` at the moment."""
    kind = device.type
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def in_own_dtypes(backward: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd function's backward that keeps its dtypes where it runs within autocast.

    As `loss.backward()` does that is called there; and where autocast is compiled, any backward of
    what was computed there. (`torch.amp.custom_bwd` is told of one kind of device for good, and of
    a call by a forward that has the context.)
    """

    @functools.wraps(backward)
    def own(ctx: Any, *grads: Tensor) -> Any:
        with without_autocast(grads[0].device):
            return backward(ctx, *grads)

    return own


class KeepsFloat32(nn.Module):
    """A module whose own parameters stay float32 through `.to(...)` of 16 or 8 bits.

    At s = 4e-5 a step, a bfloat16 tau near 0.1 would not move at all: its grid there is
    2^-11 wide. Devices and wider dtypes are followed as usual. And where `to_empty` takes the
    module from the meta device, which gives memory and no values, they get their initial ones.
    """

    def reset_parameters(self) -> None:
        """Give what is its own its initial values."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters().")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFloat32:
        own = list(self._kept())
        kept = {id(t) for t in own} | {id(t.grad) for t in own if t.grad is not None}

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.element_size() < 4
            if id(tensor) in kept and narrow:
                return tensor.to(device=moved.device, dtype=torch.float32)
            return moved

        was_meta = self._is_meta()
        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self._is_meta():
            self.reset_parameters()
        return self

    def _kept(self) -> Iterable[Tensor]:
        """What stays float32."""
        return self.parameters(recurse=False)

    def _is_meta(self) -> bool:
        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return any(tensor.is_meta for tensor in own)
