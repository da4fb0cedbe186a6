"""How a kernel is started: at once, or as an operation that whoever traces it can see."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def operation(*mutated: str) -> Callable[[_Function], _Function]:
    """Make a function that starts kernels `torch.ops.tokengate.<its name>`.

    Called as a function it takes the operation's way only where a dispatch mode looks on: that way
    takes as long as to start the kernel. `torch.compile`, export and fake tensors see through it
    to the kernels.

    Args:
        mutated: the names of arguments that are written over.
    """

    def decorate(function: _Function) -> _Function:
        # By its annotations, which older versions of PyTorch read whatever they are told.
        name = f"tokengate::{function.__name__}"
        op = torch.library.triton_op(name, function, mutates_args=mutated)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            run = op if _is_traced() else function
            device = args[0].device
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):  # of a model over several
                    return run(*args)
            return run(*args)

        return call  # type: ignore[return-value]

    return decorate


# PyTorch looks for this name in the source of an operation.
def wrap_triton(kernel: Any) -> Any:
    """What starts `kernel` where it is called: `wrap_triton(kernel)[grid](...)`."""
    if not _is_traced():
        return kernel
    if is_interpreted(kernel):
        return _Skipped()
    return torch.library.wrap_triton(kernel)


def is_interpreted(kernel: Any) -> bool:
    """Whether it is run by Triton's interpreter, which multiplies no bfloat16."""
    return not isinstance(kernel, triton.JITFunction)


def rows_of(x: Tensor) -> Tensor:
    """`(..., C) -> (N, C)`, whose rows lie anywhere and have their elements side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def packed(tensor: Tensor | None) -> Tensor | None:
    """With its elements side by side, as a kernel reads them; None stays None."""
    return None if tensor is None else tensor.contiguous()


def ranks_of(rank: int, dtype: torch.dtype) -> int:
    """How many of the low-rank space's numbers are multiplied at a time: as registers allow."""
    return block_of(rank, 16, 32 if dtype == torch.float32 else 64)


def block_of(size: int, least: int, most: int) -> int:
    """A power of two that holds `size`, within these two."""
    power: int = triton.next_power_of_2(size)
    return min(most, max(least, power))


class _Skipped:
    """Of fake tensors the interpreter has no values to work on."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _is_traced() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0
