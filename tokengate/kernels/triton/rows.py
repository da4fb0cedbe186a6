"""DoRA's lengths of the rows of W0 + scale B A, and what follows from them, without a matrix of
that size."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokengate.kernels.triton.launching import (
    block_of,
    is_interpreted,
    operation,
    ranks_of,
    wrap_triton,
)


@triton.jit
def _measure_rows(
    weight, A, B, magnitude, began, lengths, own, touched,
    n, width, rank, row_stride, column_stride, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    here = rows.to(tl.int64)[:, None]
    both = tl.zeros([ROWS], tl.float32)
    alone = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        within = columns < width
        inside = live[:, None] & within[None, :]
        at = here * row_stride + columns.to(tl.int64)[None, :] * column_stride
        w = tl.load(weight + at, inside, 0.0)
        change = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, rank, RANK):
            ranks = first + tl.arange(0, RANK)
            there = ranks < rank
            b = tl.load(B + here * rank + ranks[None, :], live[:, None] & there[None, :], 0.0)
            at_A = A + ranks[:, None] * width + columns[None, :]
            a = tl.load(at_A, there[:, None] & within[None, :], 0.0)
            if not WIDE:  # in W0's dtype
                a = a.to(w.dtype)
                b = b.to(w.dtype)
            change = tl.dot(b, a, change, input_precision="ieee")
        w = w.to(tl.float32)
        v = tl.where(inside, w + scale * change, 0.0)
        both += tl.sum(v * v, 1)
        alone += tl.sum(w * w, 1)
    tl.store(lengths + rows, tl.sqrt(both), live)
    tl.store(own + rows, tl.sqrt(alone), live)
    if began is not None:
        now = tl.load(magnitude + rows, live, 0.0)
        first_value = tl.load(began + rows, live, 0.0)
        same = (now == first_value) | ((now != now) & (first_value != first_value))
        moved = tl.where(same, 0, 1)
        for first in range(0, rank, RANK):
            ranks = first + tl.arange(0, RANK)
            inside = live[:, None] & (ranks < rank)[None, :]
            b = tl.load(B + here * rank + ranks[None, :], inside, 0.0)
            moved = tl.maximum(moved, tl.max(tl.where(b != 0, 1, 0), 1))
        tl.store(touched + tl.program_id(0), tl.max(moved, 0))


@triton.jit
def _scale_rows(
    B, magnitude, began, lengths, own, touched, up, gain, wide_gain,
    n, rank, scale, blocks,
    ROWS: tl.constexpr, RANK: tl.constexpr, BLOCKS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    here = rows.to(tl.int64)[:, None]
    length = tl.load(lengths + rows, live, 0.0)
    wanted = tl.load(magnitude + rows, live, 0.0)
    if began is not None:
        # Untrained everywhere: it is W0's, whatever that is by now.
        moved = 0
        for start in range(0, blocks, BLOCKS):
            at = start + tl.arange(0, BLOCKS)
            moved = tl.maximum(moved, tl.max(tl.load(touched + at, at < blocks, 0), 0))
        followed = tl.load(own + rows, live, 0.0)
        wanted = tl.where(moved == 0, followed, wanted)
        if WRITE:
            tl.store(magnitude + rows, wanted, live & (moved == 0))
            tl.store(began + rows, followed, live & (moved == 0))
    some = tl.zeros([ROWS], tl.int32)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        inside = live[:, None] & (ranks < rank)[None, :]
        b = tl.load(B + here * rank + ranks[None, :], inside, 0.0)
        some = tl.maximum(some, tl.max(tl.where(b != 0, 1, 0), 1))
    directed = length > 0
    change = (wanted - length) / tl.where(directed, length, 1.0)
    # Another device sums the same row to another last digit; where B is 0 that is all there is.
    noise = (some == 0) & (tl.abs(change) <= 4.76837158203125e-07)
    change = tl.where(directed & (noise == 0), change, 0.0)
    tl.store(wide_gain + rows, change, live)
    tl.store(gain + rows, change.to(gain.dtype.element_ty), live)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        inside = live[:, None] & (ranks < rank)[None, :]
        at = here * rank + ranks[None, :]
        value = (scale * (1.0 + change))[:, None] * tl.load(B + at, inside, 0.0)
        tl.store(up + at, value.to(up.dtype.element_ty), inside)


@triton.jit
def _unscale_rows(
    grad_up, grad_gain, B, gain, lengths, grad_B, grad_magnitude, n, rank, scale,
    ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    factor = scale * (1.0 + tl.load(gain + rows, live, 0.0))
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        inside = live[:, None] & (ranks < rank)[None, :]
        at = rows.to(tl.int64)[:, None] * rank + ranks[None, :]
        g = tl.load(grad_up + at, inside, 0.0).to(tl.float32)
        total += scale * tl.sum(g * tl.load(B + at, inside, 0.0), 1)
        tl.store(grad_B + at, factor[:, None] * g, inside)
    total += tl.load(grad_gain + rows, live, 0.0).to(tl.float32)
    length = tl.load(lengths + rows, live, 0.0)
    directed = length > 0
    value = tl.where(directed, total / tl.where(directed, length, 1.0), 0.0)
    tl.store(grad_magnitude + rows, value, live)


_ROWS = 16


@operation()
def measure_rows(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor, began: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the rows of W0 + scale B A and of W0, `(d,)`, and in which blocks of rows B is not 0
    or `magnitude` not what it `began` from, `(blocks,)`, integers.

    Args:
        weight: W0, `(d, k)`, of any strides.
        A: `(rank, k)`, float32.
        B: `(d, rank)`, float32.
        scale: the factor.
        magnitude: `(d,)`, float32.
        began: `(d,)`, or None: the blocks are then not looked at.
    """
    n, width = weight.shape
    rank = B.shape[1]
    blocks = triton.cdiv(n, _ROWS)
    both, own = (torch.empty((n,), dtype=torch.float32, device=B.device) for _ in range(2))
    touched = torch.empty((blocks,), dtype=torch.int32, device=B.device)
    wrap_triton(_measure_rows)[(blocks,)](
        weight, A.contiguous(), B.contiguous(), magnitude, began, both, own, touched,
        n, width, rank, weight.stride(0), weight.stride(1), scale,
        ROWS=_ROWS, COLUMNS=block_of(width, 16, 128), RANK=ranks_of(rank, weight.dtype),
        WIDE=is_interpreted(_measure_rows) or weight.dtype == torch.float32,
    )  # fmt: skip
    return both, own, touched


@operation("magnitude", "began")
def scale_rows(
    B: Tensor,
    magnitude: Tensor,
    began: Tensor | None,
    lengths: Tensor,
    own: Tensor,
    touched: Tensor,
    scale: float,
    dtype: torch.dtype,
    writes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """scale c B, `(d, rank)`, and c - 1, `(d,)`, in `dtype`; c - 1 in float32 too.

    c = magnitude / lengths. Where no block is `touched`, `magnitude` is what W0 has, and if it
    `writes`, that is written to it and to `began`.
    """
    n, rank = B.shape
    up = torch.empty((n, rank), dtype=dtype, device=B.device)
    gain = up.new_empty((n,))
    wide = torch.empty((n,), dtype=torch.float32, device=B.device)
    wrap_triton(_scale_rows)[(triton.cdiv(n, _ROWS),)](
        B.contiguous(), magnitude, began, lengths, own, touched, up, gain, wide,
        n, rank, scale, len(touched), ROWS=_ROWS, RANK=block_of(rank, 16, 128),
        BLOCKS=block_of(len(touched), 16, 1024), WRITE=writes,
    )  # fmt: skip
    return up, gain, wide


@operation()
def unscale_rows(
    grad_up: Tensor, grad_gain: Tensor, B: Tensor, gain: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Its backward, with the lengths as constants: the gradients of B and of `magnitude`."""
    n, rank = B.shape
    grad_B, grad_magnitude = torch.empty((n, rank), dtype=B.dtype, device=B.device), B.new_empty(n)
    wrap_triton(_unscale_rows)[(triton.cdiv(n, _ROWS),)](
        grad_up.contiguous(), grad_gain.contiguous(), B.contiguous(), gain, lengths,
        grad_B, grad_magnitude, n, rank, scale, ROWS=_ROWS, RANK=block_of(rank, 16, 128),
    )  # fmt: skip
    return grad_B, grad_magnitude
