"""The way down into the low-rank space: a linear map of an input that dropout thins out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokengate.precision import without_autocast


def dropped_linear(
    x: Tensor, weight: Tensor, dropout: float, training: bool, dtype: torch.dtype
) -> Tensor:
    """drop(x) weight', computed in `dtype`: `(..., in_features) -> (..., rank)`.

    The same as `F.linear(F.dropout(x, dropout), weight)`, but kept for backward are `x`, `weight`
    and a mask of one byte an element, instead of the dropped copy of `x` and casts of both.

    Args:
        x: the layer's input.
        weight: `(rank, in_features)`.
        dropout: share of the elements of x to drop in training.
        training: whether to drop them.
        dtype: the compute dtype, that of the layer's output.
    """
    keep = None
    if training and dropout > 0:
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    z: Tensor = _DroppedLinear.apply(x, weight, keep, 1 / (1 - dropout), dtype)
    return z


class _DroppedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, keep: Tensor | None, scale: float, dtype: torch.dtype
    ) -> Tensor:
        with without_autocast(x.device):
            z = F.linear(_kept(x.to(dtype), keep), weight.to(dtype))
        return z if keep is None else z * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, keep, ctx.scale, _ = inputs
        ctx.save_for_backward(x, weight, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, keep = ctx.saved_tensors
        grad_x = grad_weight = None
        if keep is not None:
            grad = grad * ctx.scale
        if ctx.needs_input_grad[0]:
            grad_x = _kept(grad @ weight.to(grad.dtype), keep).to(x.dtype)
        if ctx.needs_input_grad[1]:
            kept = _kept(x.to(grad.dtype), keep).reshape(-1, x.shape[-1])
            grad_weight = (grad.reshape(-1, grad.shape[-1]).T @ kept).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep
