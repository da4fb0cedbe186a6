"""The way up from the low-rank space: a trained factor, scaled and cast in one go."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokengate.kernels.triton.launching import block_of, operation, wrap_triton


@triton.jit
def _scale(
    factor, columns, up, n, rank, scale, ROWS: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        inside = (rows < n)[:, None] & (ranks < rank)[None, :]
        at = rows[:, None] * rank + ranks[None, :]
        value = tl.load(factor + at, inside, 0.0)
        if columns is not None:
            value = value * tl.load(columns + ranks, ranks < rank, 0.0)[None, :]
        tl.store(up + at, (scale * value).to(up.dtype.element_ty), inside)


@triton.jit
def _unscale(
    grad, factor, columns, grad_factor, sums, n, rank, scale, share,
    ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros([RANK], tl.float32)
    first = tl.program_id(0) * share
    for start in range(first, tl.minimum(first + share, n), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & (ranks < rank)[None, :]
        at = rows[:, None] * rank + ranks[None, :]
        value = scale * tl.load(grad + at, inside, 0.0).to(tl.float32)
        if columns is not None:
            total += tl.sum(value * tl.load(factor + at, inside, 0.0), 0)
            value = value * tl.load(columns + ranks, ranks < rank, 0.0)[None, :]
        tl.store(grad_factor + at, value, inside)
    if columns is not None:
        tl.store(sums + tl.program_id(0) * rank + ranks, total, ranks < rank)


@operation()
def scale_up(factor: Tensor, columns: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """scale `factor` diag(`columns`), `(C, rank)`, in `dtype`; from float32."""
    n, rank = factor.shape
    up = torch.empty((n, rank), dtype=dtype, device=factor.device)
    width = block_of(rank, 16, 128)
    block = max(1, min(2048 // width, triton.next_power_of_2(n)))
    wrap_triton(_scale)[(triton.cdiv(n, block),)](
        factor.contiguous(), columns, up, n, rank, scale, ROWS=block, RANK=width
    )
    return up


@operation()
def scale_down(
    grad: Tensor, factor: Tensor, columns: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Its backward: the gradient of `factor`, and in parts, `(parts, rank)`, of `columns`."""
    n, rank = factor.shape
    grad_factor = torch.empty((n, rank), dtype=factor.dtype, device=factor.device)
    width = block_of(rank, 16, 128)
    block = max(1, min(2048 // width, triton.next_power_of_2(n)))
    parts = triton.cdiv(n, 4 * block)
    sums = grad_factor.new_empty((0 if columns is None else parts, rank))
    wrap_triton(_unscale)[(parts, triton.cdiv(rank, width))](
        grad.contiguous(), factor.contiguous(), columns, grad_factor, sums,
        n, rank, scale, 4 * block, ROWS=block, RANK=width,
    )  # fmt: skip
    return grad_factor, sums
