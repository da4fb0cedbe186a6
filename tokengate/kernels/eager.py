"""Whether a forward may look at values: branch on them, choose shapes by them, write in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    """False where what is computed is being traced, or the tensors are not plain ones.

    Compiled code wants one graph for all values; in `torch.func` transforms, fake tensors and on
    the meta device there are none to look at.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not [t for t in tensors if type(t) not in _PLAIN or t.is_meta]


def is_watched() -> bool:
    """Whether a dispatch mode sees what is computed; it may keep what is to be written over."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
