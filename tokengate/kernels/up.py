"""The way up from the low-rank space, out of what is trained in float32: scaled, and cast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengate.kernels.eager import is_eager
from tokengate.kernels.fused import kernels_for
from tokengate.kernels.precision import in_own_dtypes


def scaled(
    factor: Tensor, scale: float, dtype: torch.dtype, columns: Tensor | None = None
) -> Tensor:
    """scale `factor` diag(`columns`), `(C, rank), (rank,) -> (C, rank)`, in `dtype`.

    Of several layers, each of them has one dimension more in front.
    """
    casts = columns is not None or factor.dtype != dtype
    if casts and factor.dim() == 2 and _by_kernels(dtype, factor, columns):
        up: Tensor = _Scaled.apply(factor, columns, scale, dtype)
        return up
    return (scale * (factor if columns is None else factor * columns.unsqueeze(-2))).to(dtype)


def scaled_rows(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    began: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    writes: bool,
) -> tuple[Tensor, Tensor] | None:
    """scale c B and c - 1 of DoRA, `(d, rank)` and `(d,)`, in `dtype`, by kernels; or None.

    c = magnitude / ||row of W0 + scale B A||, which is a constant in backward. While B is 0 and
    `magnitude` what it `began` from, it is W0's own, and if this `writes` becomes that.

    Args:
        weight: W0, `(d, k)`, which kernels take.
        A: `(rank, k)`.
        B: `(d, rank)`.
        magnitude: `(d,)`.
        began: `(d,)`, or None where `magnitude` follows nothing.
        scale: the factor.
        dtype: of what is given.
        writes: whether `magnitude` and `began` may be written over.
    """
    if not _by_kernels(dtype, A, B, magnitude, began):
        return None
    found: tuple[Tensor, Tensor] = _ScaledRows.apply(
        weight, A.detach(), B, magnitude, began, scale, dtype, writes
    )
    return found


def _by_kernels(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    present = [tensor for tensor in tensors if tensor is not None]
    plain = is_eager(*present) and all(t.dtype == torch.float32 for t in present)
    return plain and dtype != torch.float64 and kernels_for(*present) is not None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, factor: Tensor, columns: Tensor | None, scale: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(factor, columns)
        ctx.scale = scale
        kernels = kernels_for(factor)
        up: Tensor = kernels.scale_up(factor, columns, scale, dtype)
        return up

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, columns = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = ctx.scale * grad.to(factor.dtype)
            if columns is None:
                return grad, None, None, None
            return grad * columns, (grad * factor).sum(0), None, None
        kernels = kernels_for(factor)
        grad_factor, sums = kernels.scale_down(grad, factor, columns, ctx.scale)
        return grad_factor, None if columns is None else sums.sum(0), None, None


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        began: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        writes: bool,
    ) -> tuple[Tensor, Tensor]:
        kernels = kernels_for(B)
        lengths, own, touched = kernels.measure_rows(weight, A, B, scale, magnitude, began)
        up, gain, wide = kernels.scale_rows(
            B, magnitude.detach(), began, lengths, own, touched, scale, dtype, writes
        )
        ctx.save_for_backward(B, wide, lengths)
        ctx.scale = scale
        return up, gain

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad_up: Tensor, grad_gain: Tensor) -> tuple[Tensor | None, ...]:
        B, gain, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():
            wide = grad_up.to(B.dtype)
            grad_B = (ctx.scale * (1 + gain)).unsqueeze(1) * wide
            total = grad_gain.to(B.dtype) + ctx.scale * (wide * B).sum(1)
            directed = lengths > 0
            grad_magnitude = torch.where(directed, total / torch.where(directed, lengths, 1), 0)
        else:
            kernels = kernels_for(B)
            grad_B, grad_magnitude = kernels.unscale_rows(
                grad_up, grad_gain, B, gain, lengths, ctx.scale
            )
        return None, None, grad_B, grad_magnitude, *[None] * 4
