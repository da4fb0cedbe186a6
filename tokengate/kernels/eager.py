"""Whether a forward may look at values: branch on them, choose shapes by them, write in place."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
_is_tracing = torch._C._is_tracing


def is_eager(*tensors: Tensor) -> bool:
    """False where what is computed is being traced, or the tensors are not plain ones.

    Compiled code wants one graph for all values; in `torch.func` transforms, fake tensors and on
    the meta device there are none to look at; where tangents are carried forward, each step has to
    say what becomes of them.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if _is_tracing() or _derives_forward():
        return False
    return not [t for t in tensors if type(t) not in _PLAIN or t.is_meta]


def is_exported() -> bool:
    """Whether a graph is made that outlives this process: by `torch.export` or `torch.jit.trace`.

    It holds what is computed forward, of any values, and neither Python nor a backward of its own.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return bool(_is_tracing())


def has_tangent(tensor: Tensor) -> bool:
    """Whether a derivative is carried forward along `tensor`."""
    if not _derives_forward():
        return False
    unpacked: tuple[Tensor, Tensor | None] = forward_ad.unpack_dual(tensor)  # type: ignore
    return unpacked[1] is not None


def applied(function: type[torch.autograd.Function], *args: object) -> Tensor:
    """`function.apply`, with its `tangent` as `jvp` where derivatives are carried forward.

    Not elsewhere: `torch.compile` traces no function that has a `jvp`. Of what is exported, its
    forward alone.
    """
    if is_exported():
        exported: Tensor = function.forward(*args)
        return exported
    if _derives_forward():
        function = _with_jvp(function)
    elif not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        function = _in_one(function)
    value: Tensor = function.apply(*args)
    return value


@functools.cache
def _in_one(function: type[Any]) -> type[Any]:
    """The same with its context set up in forward, which only transforms want apart.

    For a `setup_context` of its own torch inspects the signature of forward in each call, which
    takes as long as the arithmetic of a few positions.
    """
    plain = torch.autograd.Function.setup_context
    if function.setup_context is plain:
        return function

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    own = {"forward": staticmethod(forward), "setup_context": staticmethod(plain)}
    return type(function.__name__, (function,), own | {"generate_vmap_rule": False})


@functools.cache
def _with_jvp(function: type[Any]) -> type[Any]:
    return type(function.__name__, (function,), {"jvp": staticmethod(function.tangent)})


def _derives_forward() -> bool:
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether a dispatch mode sees what is computed; it may keep what is to be written over."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def is_captured() -> bool:
    """Whether a CUDA graph is being captured, which waits for no value."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
