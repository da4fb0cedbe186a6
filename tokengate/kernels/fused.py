"""Whether Triton's kernels compute a call, which then takes few launches and waits for nothing.

They give what PyTorch's own operations give, and those do it where there is no such GPU, no Triton
(Windows, macOS), or another dtype; and where Triton cannot compile, of which there is one warning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from tokengate.errors import KernelsWarning, brief
from tokengate.kernels.eager import is_captured

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(first: Tensor, *others: Tensor | None) -> Any:
    """`tokengate.kernels.triton`, if that takes these tensors, which are eager ones; or None."""
    device = first.device
    kernels = _on(device)
    if kernels is None:
        return None
    for tensor in (first, *[other for other in others if other is not None]):
        if tensor.device != device or tensor.dtype not in _DTYPES or not tensor.numel():
            return None
        if tensor.layout != torch.strided or tensor.is_nested:
            return None
    return kernels


def _on(device: torch.device) -> Any:
    return _of_gpu(device) if device.type == "cuda" else None


@functools.cache
def _of_gpu(device: torch.device) -> Any:
    # Of AMD's there was none to try them on.
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("tokengate.kernels.triton")
        # Triton compiles where it runs: a container may have no C compiler, a GPU be too new.
        one = torch.ones((16, 16), dtype=torch.float32, device=device)
        kernels.measure(one, None, None, one, one, None)
    except Exception as error:
        # A CUDA graph captures, in which nothing can be loaded, or memory is full: not so later.
        if is_captured() or isinstance(error, torch.OutOfMemoryError):
            raise
        warnings.warn(
            f"Triton's kernels do not run on {device}, {type(error).__name__}: "
            f"{brief(str(error))}, so PyTorch's own operations take their place, which give the "
            "same in more time: mend that, or ignore this.",
            KernelsWarning,
            stacklevel=2,
        )
        return None
    return kernels
