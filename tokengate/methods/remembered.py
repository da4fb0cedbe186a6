"""What was computed of some tensors, for as long as none of them changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_T = TypeVar("_T")


class Remembered(Generic[_T]):
    """The last value, for as long as a key stays equal and tensors the same, and unchanged.

    Every in-place operation raises a tensor's version. PyTorch does not see writes through
    `tensor.data`: call `forget` after those, and where a module is loaded, cast or moved, which
    may go that way too.
    """

    _key: object = None
    _tensors: tuple[Tensor, ...] = ()
    _value: _T

    def of(
        self, key: tuple[object, ...], tensors: tuple[Tensor, ...], compute: Callable[[], _T]
    ) -> _T:
        """`compute()`, or what it gave last. The tensors are kept, so that no other has their ids.

        Within compiled code and a CUDA graph's capture, which may keep no state of Python's, and
        of inference tensors, which have no version, it is computed each time.
        """
        if torch.compiler.is_compiling() or _captures():
            return compute()
        try:
            key = (*key, *[(id(tensor), tensor._version) for tensor in tensors])
        except RuntimeError:
            return compute()
        if key != self._key:
            self._value, self._key, self._tensors = compute(), key, tensors
        return self._value

    def forget(self) -> None:
        """Compute anew when asked next."""
        self.__dict__.clear()

    def __reduce__(self) -> tuple[type[Remembered[_T]], tuple[()]]:
        # A copy stands beside copied tensors.
        return type(self), ()


def optimiser_steps() -> int:
    """How many steps the optimisers of this process have taken.

    DeepSpeed and FSDP write what a step gave to the parameters in ways that raise no version.
    """
    return _steps


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_steps = 0


def _count(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)
