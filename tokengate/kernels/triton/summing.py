"""out + a M(x) of a factored M(x), which is made nowhere else than in a processor's registers."""

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


@triton.jit(do_not_specialize=["n"])
def _sum(
    out, bias, z, up, gain, a, h, n, out_stride, channels, rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, COLUMNS)
    rows = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    live, within = rows < n, columns < channels
    inside = live[:, None] & within[None, :]
    here = rows.to(tl.int64)[:, None]
    kept = tl.load(out + here * out_stride + columns[None, :], inside, 0.0)
    m = m_of_block(z, up, rows, live, columns, within, rank, ROWS, COLUMNS, RANK, WIDE)
    if gain is not None:
        w = kept.to(tl.float32)
        if bias is not None:
            w -= tl.load(bias + columns, within, 0.0).to(tl.float32)[None, :]
        m += tl.load(gain + columns, within, 0.0).to(tl.float32)[None, :] * w
    if a is None:
        changed = (kept.to(tl.float32) + m).to(kept.dtype)
    else:
        weight = tl.load(a + rows, live, 0).to(tl.float32)[:, None]
        changed = (kept.to(tl.float32) + weight * m).to(kept.dtype)
        # A selection: what is closed is as it was, whatever M(x) is there.
        changed = tl.where(weight != 0, changed, kept)
    tl.store(h + here * channels + columns[None, :], changed, inside)


def _write(
    h: Tensor,
    out: Tensor,
    bias: Tensor | None,
    z: Tensor,
    up: Tensor,
    gain: Tensor | None,
    a: Tensor | None,
) -> None:
    rows = rows_of(out)
    n, channels = rows.shape
    rank = up.shape[1]
    block = 16 if n <= 16 else 64
    width = block_of(channels, 16, 64 if n <= 16 else 128)
    grid = (triton.cdiv(n, block) * triton.cdiv(channels, width),)
    wrap_triton(_sum)[grid](
        rows, packed(bias), packed(z), packed(up), packed(gain), packed(a), h,
        n, rows.stride(0), channels, rank,
        ROWS=block, COLUMNS=width, RANK=ranks_of(rank, out.dtype), WIDE=is_interpreted(_sum),
        num_warps=4 if block == 16 else 8,
    )  # fmt: skip


@operation()
def gated_sum(
    out: Tensor,
    bias: Tensor | None,
    z: Tensor,
    up: Tensor,
    gain: Tensor | None,
    a: Tensor | None,
) -> Tensor:
    """out + a (up z + gain w), `(..., C)`, w = out - bias; where a_i is 0, `out` bit for bit."""
    h = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _write(h, out, bias, z, up, gain, a)
    return h


@operation("out")
def gated_sum_(
    out: Tensor,
    bias: Tensor | None,
    z: Tensor,
    up: Tensor,
    gain: Tensor | None,
    a: Tensor | None,
) -> None:
    """The same, written over `out`, which is contiguous."""
    _write(out, out, bias, z, up, gain, a)
