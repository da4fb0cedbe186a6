"""How large M(x) and w are at each position, and whether a threshold opens it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokengate.kernels.triton.launching import (
    block_of,
    is_interpreted,
    operation,
    packed,
    ranks_of,
    rows_of,
    wrap_triton,
)
from tokengate.kernels.triton.products import m_of_block
from tokengate.kernels.triton.squares import add_squares, root, times_two_to

# So many programs keep a GPU busy. Of few positions, as when a token is generated, each is
# measured by several programs.
_PROGRAMS = 512


@triton.jit(do_not_specialize=["n"])
def _measure(
    out, bias, whole, z, up, gain, sums, n, out_stride, whole_stride, channels, rank, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    live = rows < n
    m_large = tl.zeros([ROWS], tl.float32)
    m_middle = tl.zeros([ROWS], tl.float32)
    m_small = tl.zeros([ROWS], tl.float32)
    w_large = tl.zeros([ROWS], tl.float32)
    w_middle = tl.zeros([ROWS], tl.float32)
    w_small = tl.zeros([ROWS], tl.float32)
    for start in range(part * share, tl.minimum(part * share + share, channels), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        within = columns < channels
        inside = live[:, None] & within[None, :]
        at = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        w = tl.load(out + at, inside, 0.0).to(tl.float32)
        if bias is not None:
            w -= tl.load(bias + columns, within, 0.0).to(tl.float32)[None, :]
        w = tl.where(inside, w, 0.0)
        if whole is not None:
            at = rows.to(tl.int64)[:, None] * whole_stride + columns[None, :]
            m = tl.load(whole + at, inside, 0.0).to(tl.float32)
        else:
            m = m_of_block(z, up, rows, live, columns, within, rank, ROWS, COLUMNS, RANK, WIDE)
            if gain is not None:
                m += tl.load(gain + columns, within, 0.0).to(tl.float32)[None, :] * w
            # Infinity times a 0 that is beyond the edge is no 0.
            m = tl.where(inside, m, 0.0)
        m_large, m_middle, m_small = add_squares(m, m_large, m_middle, m_small)
        w_large, w_middle, w_small = add_squares(w, w_large, w_middle, w_small)
    to = sums + part.to(tl.int64) * 6 * n + rows
    tl.store(to, m_large, live)
    tl.store(to + n, m_middle, live)
    tl.store(to + 2 * n, m_small, live)
    tl.store(to + 3 * n, w_large, live)
    tl.store(to + 4 * n, w_middle, live)
    tl.store(to + 5 * n, w_small, live)


@triton.jit
def _norm(sums, n, rows, live, parts, PARTS: tl.constexpr):
    large = tl.zeros(rows.shape, tl.float32)
    middle = tl.zeros(rows.shape, tl.float32)
    small = tl.zeros(rows.shape, tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & live[None, :]
        at = sums + part[:, None] * 6 * n.to(tl.int64) + rows[None, :]
        large += tl.sum(tl.load(at, inside, 0.0), 0)
        middle += tl.sum(tl.load(at + n, inside, 0.0), 0)
        small += tl.sum(tl.load(at + 2 * n, inside, 0.0), 0)
    return root(large, middle, small)


@triton.jit(do_not_specialize=["n", "parts"])
def _finish(sums, norms, powers, n, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    of_m, m_exponent = _norm(sums, n, rows, live, parts, PARTS)
    of_w, w_exponent = _norm(sums + 3 * n, n, rows, live, parts, PARTS)
    tl.store(norms + rows, of_m, live)
    tl.store(norms + n + rows, of_w, live)
    one = tl.full(rows.shape, 1.0, tl.float32)
    tl.store(powers + rows, times_two_to(one, m_exponent), live)
    tl.store(powers + n + rows, times_two_to(one, w_exponent), live)


@triton.jit(do_not_specialize=["n", "parts"])
def _decide(sums, tau, is_open, n, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    of_m, m_exponent = _norm(sums, n, rows, live, parts, PARTS)
    of_w, w_exponent = _norm(sums + 3 * n, n, rows, live, parts, PARTS)
    limit = tl.load(tau).to(tl.float32) * of_w
    # The negation, not >=: a comparison with NaN is false, which leaves the gate open.
    closed = times_two_to(of_m, m_exponent - w_exponent) < limit
    tl.store(is_open + rows, tl.where(closed, 0.0, 1.0).to(is_open.dtype.element_ty), live)


@operation()
def measure(
    out: Tensor,
    bias: Tensor | None,
    whole: Tensor | None,
    z: Tensor | None,
    up: Tensor | None,
    gain: Tensor | None,
) -> Tensor:
    """The sums from which `finish` and `decide` have ||m_i|| and ||w_i||: `(parts, 6, N)`.

    w = out - bias, `(..., C)`; m is `whole`, `(..., C)`, or up z + gain w. Both in float32.
    """
    rows = rows_of(out)
    n, channels = rows.shape
    rank = 0 if up is None else up.shape[1]
    block = 16 if n <= 16 or channels <= 64 else 32
    width = block_of(channels, 16, 128)
    most, blocks = triton.cdiv(channels, width), triton.cdiv(n, block)
    # Of each program as many blocks of columns.
    each = triton.cdiv(most, min(most, triton.cdiv(_PROGRAMS, blocks)))
    parts = triton.cdiv(most, each)
    sums = torch.empty((parts, 6, n), dtype=torch.float32, device=out.device)
    m = None if whole is None else rows_of(whole)
    wrap_triton(_measure)[(blocks, parts)](
        rows, packed(bias), m, packed(z), packed(up), packed(gain), sums,
        n, rows.stride(0), 0 if m is None else m.stride(0), channels, rank, each * width,
        ROWS=block, COLUMNS=width, RANK=ranks_of(rank, out.dtype), WIDE=is_interpreted(_measure),
        num_warps=4 if block == 16 else 8,
    )  # fmt: skip
    return sums


@operation()
def finish(sums: Tensor) -> tuple[Tensor, Tensor]:
    """n and p, `(2, N)` both, of ||m_i|| and ||w_i|| = n p, p powers of two."""
    parts, _, n = sums.shape
    norms, powers = sums.new_empty((2, n)), sums.new_empty((2, n))
    blocks = {"ROWS": block_of(n, 16, 128), "PARTS": block_of(parts, 1, 64)}
    grid = (triton.cdiv(n, blocks["ROWS"]),)
    wrap_triton(_finish)[grid](sums, norms, powers, n, parts, **blocks)
    return norms, powers


@operation()
def decide(sums: Tensor, tau: Tensor, dtype: torch.dtype) -> Tensor:
    """S of eq. 4, `(N,)`, in `dtype`; tau has one element, and stays on its device."""
    parts, _, n = sums.shape
    is_open = torch.empty((n,), dtype=dtype, device=sums.device)
    blocks = {"ROWS": block_of(n, 16, 128), "PARTS": block_of(parts, 1, 64)}
    grid = (triton.cdiv(n, blocks["ROWS"]),)
    wrap_triton(_decide)[grid](sums, tau, is_open, n, parts, **blocks)
    return is_open
