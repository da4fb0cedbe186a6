"""The way down into the low-rank space: a linear map of an input that dropout thins out."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokengate.kernels.eager import applied, is_eager, is_watched
from tokengate.kernels.fused import kernels_for
from tokengate.kernels.groups import Groups, grouped_product
from tokengate.kernels.precision import autocasts, in_own_dtypes, without_autocast

# Up to this share a list of what is dropped, 8 bytes each, takes less than a mask of all.
_LISTED = 1 / 8


def dropped_linear(
    x: Tensor, weight: Tensor, dropout: float, training: bool, dtype: torch.dtype
) -> Tensor:
    """drop(x) weight', computed in `dtype`: `(..., in_features) -> (..., rank)`.

    The same as `F.linear(F.dropout(x, dropout), weight)`, but kept for backward are `x`, `weight`
    and which elements are dropped, at most a byte an element, instead of the dropped copy of `x`
    and casts of both.

    Args:
        x: the layer's input.
        weight: `(rank, in_features)`.
        dropout: share of the elements of x to drop in training.
        training: whether to drop them.
        dtype: the compute dtype, that of the layer's output.
    """
    drops = training and dropout > 0
    # Of other inputs F.linear keeps a copy for backward, in another dtype or layout; and within
    # autocast its backward may come in another one.
    kept_as_it_is = x.dtype == weight.dtype == dtype and x.is_contiguous()
    is_plain = kept_as_it_is and not autocasts(x.device)
    if not drops and (is_plain or not torch.is_grad_enabled()):
        with without_autocast(x.device):
            return F.linear(x.to(dtype), weight.to(dtype))
    dropped = _drop(x, dropout, is_eager(x)) if drops else None
    return applied(_DroppedLinear, x, weight, dropped, 1 / (1 - dropout), dtype)


def branched_linear(
    x: Tensor, weight: Tensor, dropout: float, training: bool
) -> tuple[Tensor, Tensor]:
    """x for another layer to read, and `dropped_linear` of it in its dtype; eager only.

    Backward adds the gradient that comes through `weight` in place to that of the other layer.
    Autograd would make a second tensor of x's size for it, which only dropout by a mask or a seed
    still needs, and often a third for the sum. Who keeps the gradients between the graph's own
    nodes sees the sum instead of the other layer's.
    """
    dropped = _drop(x, dropout, eager=True) if training and dropout > 0 else None
    branches: tuple[Tensor, Tensor] = _Branched.apply(x, weight, dropped, 1 / (1 - dropout))
    return branches


def grouped_linear(
    x: Tensor, stack: Tensor, dropout: float, training: bool, dtype: torch.dtype, groups: Groups
) -> Tensor:
    """The same where rows are of several layers: `(N, in_features), (E, rank, ...) -> (N, rank)`.

    Kept for backward are the dropped x and the stack, in `dtype`.
    """
    with without_autocast(x.device):
        dropped = F.dropout(x.to(dtype), dropout, training)
        return grouped_product(dropped, stack.to(dtype).mT, groups)


def _drop(x: Tensor, dropout: float, eager: bool) -> Tensor:
    """Which elements are dropped: a list of positions in the flattened `x`, or a mask like `x`; or
    for kernels the seed, `()`, from which they know."""
    if eager and kernels_for(x) is not None:
        return torch.randint(2**62, (), device=x.device)  # by the device, as a CUDA graph wants it
    if dropout <= _LISTED and x.device.type == "cpu" and eager:
        return _draw(x.numel(), dropout)
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(dropout)


def _draw(n: int, share: float) -> Tensor:
    """The numbers of 0..n-1, each with probability `share`, in rising order: `(dropped,)`.

    From one number to the next it is a geometric distance, so that only those are drawn.
    """
    found = torch.empty(0, dtype=torch.float64)
    last = 0.0
    while last <= n:
        # Enough all but once in a billion times.
        expected = (n - last) * share
        size = int(expected + 6 * math.sqrt(expected)) + 8
        # In double: the steps of a uniform float32 are seen in the distances.
        distances = torch.rand(size, dtype=torch.float64).neg_().log1p_()
        distances = distances.div_(math.log1p(-share)).floor_().add_(1)
        numbers = distances.cumsum_(0).add_(last)
        last = float(numbers[-1])
        found = numbers if not len(found) else torch.cat([found, numbers])
    return found[: int(torch.searchsorted(found, n + 0.5))].sub_(1).long()


class _DroppedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, dropped: Tensor | None, scale: float, dtype: torch.dtype
    ) -> Tensor:
        with without_autocast(x.device):
            z = F.linear(_thinned(x.to(dtype), dropped, scale), weight.to(dtype))
        return z if _is_scaled(dropped) else z * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, dropped, ctx.scale, ctx.out_dtype = inputs
        ctx.dtype = x.dtype
        # Without a gradient of the weight nobody asks for x.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, dropped)
        ctx.save_for_forward(x, weight, dropped)

    @staticmethod
    def tangent(ctx: Any, x: Tensor | None, weight: Tensor | None, *_: None) -> Tensor:
        at_x, at_weight, dropped = ctx.saved_tensors
        dtype = ctx.out_dtype
        with without_autocast(at_x.device):
            z: Tensor = at_x.new_zeros((*at_x.shape[:-1], len(at_weight)), dtype=dtype)
            if x is not None:
                z = z + F.linear(_thinned(x.to(dtype), dropped), at_weight.to(dtype))
            if weight is not None:
                z = z + F.linear(_thinned(at_x.to(dtype), dropped), weight.to(dtype))
        return z if dropped is None else z * ctx.scale

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, dropped = ctx.saved_tensors
        grad_x = grad_weight = None
        if not _is_scaled(dropped):
            grad = grad * ctx.scale
        if ctx.needs_input_grad[0]:
            grad_x = _grad_of_x(grad, weight, dropped, ctx.scale).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _grad_of_weight(grad, x, dropped, ctx.scale).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


class _Branched(torch.autograd.Function):
    """x, and z as `_DroppedLinear` has it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dropped: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.summed = None
        inputs = (x, weight, dropped, scale, x.dtype)
        z = _DroppedLinear.forward(*inputs)
        _DroppedLinear.setup_context(ctx, inputs, z)
        return x, z

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, dropped = ctx.saved_tensors
        grad_weight = None
        if not _is_scaled(dropped):
            grad = grad * ctx.scale
        if not _may_write() or not grad_x.is_contiguous():
            grad_x = grad_x + _grad_of_x(grad, weight, dropped, ctx.scale)
        # Pipelines keep what a node was given, and give it once more for the weights alone.
        elif ctx.summed is None or ctx.summed() is not grad_x:
            _add_grad_of_x(grad_x, grad, weight, dropped, ctx.scale)
            ctx.summed = weakref.ref(grad_x)
        if ctx.needs_input_grad[1]:
            grad_weight = _grad_of_weight(grad, x, dropped, ctx.scale).to(weight.dtype)
        return grad_x, grad_weight, None, None


def _may_write() -> bool:
    """Whether backward may write over what nobody else has: not where that is kept or derived."""
    return not (torch.is_grad_enabled() or is_watched())


def _is_scaled(dropped: Tensor | None) -> bool:
    """Whether what is kept needs no scale, or kernels, which know what is dropped, give it one."""
    return dropped is None or _is_seed(dropped)


def _is_seed(dropped: Tensor) -> bool:
    return dropped.dtype == torch.int64 and dropped.dim() == 0


def _grad_of_x(grad: Tensor, weight: Tensor, dropped: Tensor | None, scale: float) -> Tensor:
    return _thinned(grad @ weight.to(grad.dtype), dropped, scale, in_place=_may_write())


def _add_grad_of_x(
    grad_x: Tensor, grad: Tensor, weight: Tensor, dropped: Tensor | None, scale: float
) -> None:
    if dropped is not None and _is_seed(dropped):
        kernels = kernels_for(grad_x)
        kernels.add_thinned_(grad_x, grad @ weight.to(grad.dtype), dropped, 1 - 1 / scale)
        return
    if dropped is not None and dropped.dtype == torch.bool:
        grad_x += _grad_of_x(grad, weight, dropped, scale)
        return
    flat = grad_x.view(-1)
    kept = None if dropped is None else flat.index_select(0, dropped)
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x.view(-1, grad_x.shape[-1]).addmm_(rows, weight.to(grad.dtype))
    if dropped is not None and kept is not None:  # what is dropped gets nothing added
        flat.index_copy_(0, dropped, kept)


def _grad_of_weight(grad: Tensor, x: Tensor, dropped: Tensor | None, scale: float) -> Tensor:
    thinned = _thinned(x.to(grad.dtype), dropped, scale).reshape(-1, x.shape[-1])
    return grad.reshape(-1, grad.shape[-1]).T @ thinned


def _thinned(
    x: Tensor, dropped: Tensor | None, scale: float = 1.0, in_place: bool = False
) -> Tensor:
    """`x` with 0 at `dropped`: a mask, a list of positions in the flattened `x`, or a seed.

    By a seed what is kept is multiplied by `scale`, too.
    """
    if dropped is None:
        return x
    if _is_seed(dropped):
        kernels = kernels_for(x)
        if torch.is_grad_enabled() and x.requires_grad:  # of which it knows nothing
            kept: Tensor = kernels.thin(torch.ones_like(x), dropped, 1 - 1 / scale)
            return x * kept
        thinned: Tensor = kernels.thin(x, dropped, 1 - 1 / scale)
        return thinned
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped, 0) if in_place else x.masked_fill(dropped, 0)
    flat = x.flatten()
    flat = flat.index_fill_(0, dropped, 0) if in_place else flat.index_fill(0, dropped, 0)
    return flat.view(x.shape)
