"""||up z_i|| of a product that is not made: from the r x r products of up's columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokengate.kernels.norms import Norms, accumulation_dtype, norms

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
    wide = torch.float32 if z.device.type == "mps" else torch.float64  # which mps has not
    square, _ = _from_gram(z, up, wide)
    some = ~(square <= 0)  # a NaN stays one
    return torch.where(some, square, 1).sqrt().where(some, 0)


class SizeOfProduct(torch.autograd.Function):
    """||up z_i||, `(..., rank), (C, rank), (...) -> (...)`, which is given: its gradients.

    With c_i = dL/d||m_i|| / ||m_i||, 0 where m_i is: dL/dz_i = c_i up' up z_i and dL/dup = up
    sum_i c_i z_i z_i', r x r products, for which nothing is kept that the sum does not keep.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, up: Tensor, size: Tensor) -> Tensor:
        ctx.save_for_backward(z, up, size)
        return size.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, up, size = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient that has gradients
            size = norm_from_gram(z, up).to(size.dtype)
        some = size > 0
        c = torch.where(some, grad / torch.where(some, size, 1), 0).reshape(-1, 1)
        rows, wide = z.reshape(-1, z.shape[-1]).to(c.dtype), up.to(c.dtype)
        gram = wide.T @ wide
        grad_z = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_z = (c * (rows @ gram)).to(z.dtype).view(z.shape)
        if ctx.needs_input_grad[1]:
            grad_up = (wide @ ((c * rows).T @ rows)).to(up.dtype)
        return grad_z, grad_up, None


def _from_gram(z: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """||up z_i||^2, and the largest that it can be: ||up||^2 ||z_i||^2, `(...), (...)`."""
    z, up = z.to(dtype), up.to(dtype)
    gram = up.T @ up
    return torch.linalg.vecdot(z @ gram, z), gram.trace() * torch.linalg.vecdot(z, z)
