"""||m_i|| of a product that is not kept, of most not even made: from the r x r products of `up`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokengate.kernels.factors import Factors
from tokengate.kernels.gated_sum import blocks, without_bias
from tokengate.kernels.norms import Norms, accumulation_dtype, norms
from tokengate.kernels.precision import finest_dtype, in_own_dtypes

# Elements of a product that takes no longer than to start the operations it saves.
_SMALL = 2**14


def norms_of_product(z: Tensor, up: Tensor) -> Norms:
    """||up z_i|| from the r x r products of up's columns: `(..., r), (C, r) -> (...), (...)`.

    Where M(x) is small its own, which takes fewer operations, or of few positions less work; and of
    doubles, whose squares no wider numbers hold.
    """
    rank = up.shape[1]
    is_small = z.numel() <= rank * rank or z.numel() // rank * len(up) <= _SMALL
    if is_small or z.dtype == torch.float64:
        return norms(F.linear(z, up), accumulation_dtype(z), True)
    if z.device.type == "cpu":
        square, bound = _from_gram(z, up, torch.float32)
        least, largest = bound.aminmax()  # both are NaN where one of them is
        # Else squares may have left float32's range, or what is left of their differences is
        # rounding.
        in_range = least.item() > 1e-30 and largest.item() < 1e30
        if in_range and (square / bound).amin().item() > 1e-3:
            return square.sqrt_(), 1.0
    return norm_from_gram(z, up), 1.0


def norm_from_gram(z: Tensor, up: Tensor) -> Tensor:
    """||up z_i||, `(..., r), (C, r) -> (...)`, which has gradients: 0 where it is 0."""
    square, _ = _from_gram(z, up, finest_dtype(z.device))
    some = ~(square <= 0)  # a NaN stays one
    return torch.where(some, square, 1).sqrt().where(some, 0)


class SizeOfProduct(torch.autograd.Function):
    """||m_i|| of m = up z + gain w, w = out - bias, `(...)`, given as `size`: its gradients.

    With c_i = dL/d||m_i|| / ||m_i||, 0 where m_i is, dL/dm_i = c_i m_i. Nothing is kept that the
    sum does not keep: m is made again, a few positions at a time, of those that have a gradient;
    without a gain (then `out` and `bias` are None, too) not even that: dL/dz_i = c_i up' up z_i and
    dL/dup = up sum_i c_i z_i z_i', r x r products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor | None,
        bias: Tensor | None,
        z: Tensor,
        up: Tensor,
        gain: Tensor | None,
        size: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(out, bias, z, up, gain, size)
        return size.clone()

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, bias, z, up, gain, size = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient that has gradients
            size = _size(out, bias, z, up, gain).to(size.dtype)
        some = size > 0
        c = torch.where(some, grad / torch.where(some, size, 1), 0).reshape(-1, 1)
        if gain is not None:
            return *_through_product(c, out, bias, z, up, gain, ctx.needs_input_grad), None
        rows, wide = z.reshape(-1, z.shape[-1]).to(c.dtype), up.to(c.dtype)
        grad_z = grad_up = None
        if ctx.needs_input_grad[2]:
            grad_z = (c * (rows @ (wide.T @ wide))).to(z.dtype).view(z.shape)
        if ctx.needs_input_grad[3]:
            grad_up = (wide @ ((c * rows).T @ rows)).to(up.dtype)
        return None, None, grad_z, grad_up, None, None


def _size(
    out: Tensor | None, bias: Tensor | None, z: Tensor, up: Tensor, gain: Tensor | None
) -> Tensor:
    if out is None or gain is None:
        return norm_from_gram(z, up)
    m = Factors(z, up, gain).product(without_bias(out, bias))
    size: Tensor = torch.linalg.vector_norm(m, dim=-1, dtype=accumulation_dtype(m))
    return size


def _through_product(
    c: Tensor,
    out: Tensor,
    bias: Tensor | None,
    z: Tensor,
    up: Tensor,
    gain: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of out, bias, z, up and gain from dL/dm_i = c_i m_i; c is `(N, 1)`."""
    flat, low = out.reshape(-1, out.shape[-1]), z.reshape(-1, z.shape[-1])
    at: Any = blocks(flat)
    derives = torch.is_grad_enabled()
    if derives:  # gradients of what has none, too, in one, and nothing is written over
        at = [slice(None)]
    elif c.device.type == "cpu":  # elsewhere to ask which have one would be to wait
        some = c.view(-1).nonzero().view(-1)
        at = [some[block] for block in blocks(flat[: len(some)])] if len(some) else []
    grad_w = torch.zeros_like(flat) if needs[0] or needs[1] else None
    grad_z = torch.zeros_like(low)
    grad_up, grad_gain = torch.zeros_like(up, dtype=c.dtype), torch.zeros_like(gain, dtype=c.dtype)
    for rows in at:
        w, some_z = without_bias(flat[rows], bias), low[rows]
        m = (gain * w).addmm_(some_z, up.T)
        m = torch.mul(c[rows], m, out=None if derives else m).to(out.dtype)
        grad_z[rows] = m @ up
        grad_up = grad_up + m.T @ some_z
        grad_gain = grad_gain + (m * w).sum(0, dtype=c.dtype)
        if grad_w is not None:
            grad_w[rows] = torch.mul(gain, m, out=None if derives else m)
    grad_bias = None if grad_w is None or bias is None else -grad_w.sum(0).to(bias.dtype)
    grad_out = None if grad_w is None else grad_w.view(out.shape)
    return grad_out, grad_bias, grad_z.view(z.shape), grad_up.to(up.dtype), grad_gain.to(gain.dtype)


def _from_gram(z: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """||up z_i||^2, and the largest that it can be: ||up||^2 ||z_i||^2, `(...), (...)`."""
    z, up = z.to(dtype), up.to(dtype)
    gram = up.T @ up
    return torch.linalg.vecdot(z @ gram, z), gram.trace() * torch.linalg.vecdot(z, z)
