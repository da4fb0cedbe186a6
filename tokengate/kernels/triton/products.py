"""A block of up z, made where it is used."""

import triton
import triton.language as tl


@triton.jit
def m_of_block(
    z, up, rows, live, columns, within, rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """up z_i at these positions and channels, `(ROWS, COLUMNS)`, summed in float32.

    z is `(N, rank)`, `up` `(C, rank)`; WIDE: multiply in float32, as the interpreter must.
    """
    m = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        there = ranks < rank
        at_z = rows.to(tl.int64)[:, None] * rank + ranks[None, :]
        at_up = columns[None, :] * rank + ranks[:, None]
        a = tl.load(z + at_z, live[:, None] & there[None, :], 0.0)
        b = tl.load(up + at_up, there[:, None] & within[None, :], 0.0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        m = tl.dot(a, b, m, input_precision="ieee")
    return m
