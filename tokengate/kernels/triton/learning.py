"""What backward gives the factors of M(x), the gate's weights and tau."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokengate.kernels.triton.launching import (
    block_of,
    operation,
    packed,
    rows_of,
    wrap_triton,
)


@triton.jit(do_not_specialize=["n", "parts"])
def _weigh(
    z, down, a, mu_of_w, mu, weighted, passed, n, parts, rank,
    ROWS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    if a is not None:
        weight = tl.load(a + rows, live, 0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        inside = live[:, None] & (ranks < rank)[None, :]
        at = rows.to(tl.int64)[:, None] * rank + ranks[None, :]
        at_z = tl.load(z + at, inside, 0.0)
        at_down = tl.load(down + at, inside, 0.0)
        if mu is not None:
            total += tl.sum(at_z.to(tl.float32) * at_down.to(tl.float32), 1)
        # Selections: what is closed is 0, whatever it was.
        if weighted is not None:
            some = at_z.to(tl.float32)
            if a is not None:
                some = tl.where(weight != 0, weight * some, 0.0)
            tl.store(weighted + at, some.to(at_z.dtype), inside)
        if passed is not None:
            some = at_down.to(tl.float32)
            if a is not None:
                some = tl.where(weight != 0, weight * some, 0.0)
            tl.store(passed + at, some.to(at_down.dtype), inside)
    if mu is not None:
        if mu_of_w is not None:
            for start in range(0, parts, PARTS):
                part = start + tl.arange(0, PARTS)
                at_part = mu_of_w + part[:, None] * n.to(tl.int64) + rows[None, :]
                inside = (part < parts)[:, None] & live[None, :]
                total += tl.sum(tl.load(at_part, inside, 0.0), 0)
        tl.store(mu + rows, total, live)


@triton.jit(do_not_specialize=["n"])
def _direct(mu, a, mask, pull, penalty, grad_tau, n, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    opened = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = at < n
        direction = tl.load(mu + at, counts, 0.0)
        is_open = tl.load(a + at, counts, 0).to(tl.float32) != 0
        if mask is not None:
            counts = counts & (tl.load(mask + at, counts, 0).to(tl.float32) != 0)
        opened += tl.where(is_open & counts, 1.0, 0.0)
        moves = counts & ((direction >= 0) == is_open)
        sums += tl.where(moves, direction, 0.0)
    if pull is not None:
        penalty = tl.load(pull).to(tl.float32)
    g = tl.sum(sums, 0) + penalty * tl.sum(opened, 0)
    tl.store(grad_tau, -g)


@triton.jit(do_not_specialize=["n"])
def _pass_gain(
    grad, out, bias, gain, a, grad_out, mu, sums, n, grad_stride, out_stride, channels, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(0), tl.program_id(1)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < channels
    factor = tl.load(gain + columns, within, 0.0).to(tl.float32)[None, :]
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(group * share, tl.minimum(group * share + share, n), ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < n
        here = rows.to(tl.int64)[:, None]
        inside = live[:, None] & within[None, :]
        g = tl.load(grad + here * grad_stride + columns[None, :], inside, 0.0).to(tl.float32)
        w = tl.load(out + here * out_stride + columns[None, :], inside, 0.0).to(tl.float32)
        if bias is not None:
            w -= tl.load(bias + columns, within, 0.0).to(tl.float32)[None, :]
            w = tl.where(inside, w, 0.0)
        if mu is not None:
            tl.store(mu + part.to(tl.int64) * n + rows, tl.sum(g * w * factor, 1), live)
        passed = g
        if a is not None:
            weight = tl.load(a + rows, live, 0).to(tl.float32)[:, None]
            passed = tl.where(weight != 0, weight * g, 0.0)
        total += tl.sum(passed * w, 0)
        changed = (g + passed * factor).to(grad_out.dtype.element_ty)
        tl.store(grad_out + here * channels + columns[None, :], changed, inside)
    tl.store(sums + group.to(tl.int64) * channels + columns, total, within)


@operation()
def weigh(
    z: Tensor,
    down: Tensor,
    a: Tensor | None,
    mu_of_w: Tensor | None,
    needs_mu: bool,
    needs_up: bool,
    needs_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """mu, `(N,)`, a z and a down, `(N, rank)`; empty where they are not needed.

    Args:
        z: `(N, rank)`.
        down: up' G, `(N, rank)`.
        a: `(N,)`, or None for 1.
        mu_of_w: what is added to <down_i, z_i> for mu_i, in parts, `(parts, N)`.
        needs_mu: and the others: whether that one is needed.
    """
    n, rank = z.shape
    mu = torch.empty((n if needs_mu else 0,), dtype=torch.float32, device=z.device)
    weighted = z.new_empty((n if needs_up else 0, rank))
    passed = z.new_empty((n if needs_z else 0, rank))
    width = block_of(rank, 16, 128)
    block = max(1, min(2048 // width, triton.next_power_of_2(n)))
    parts = 1 if mu_of_w is None else len(mu_of_w)
    wrap_triton(_weigh)[(triton.cdiv(n, block),)](
        packed(z), packed(down), packed(a), mu_of_w, mu if needs_mu else None,
        weighted if needs_up else None, passed if needs_z else None,
        n, parts, rank, ROWS=block, RANK=width, PARTS=block_of(parts, 1, 32),
    )  # fmt: skip
    return mu, weighted, passed


@operation()
def direct(
    mu: Tensor,
    a: Tensor,
    mask: Tensor | None,
    pull: Tensor | None,
    penalty: float,
    dtype: torch.dtype,
) -> Tensor:
    """tau's gradient -g of eq. 17, `(1,)`, always summed in one order.

    Args:
        mu: `(N,)`.
        a: S, `(N,)`.
        mask: `(N,)`; 0 where a position does not count. None: all do.
        pull: what an open position adds, one element; None for `penalty`.
        penalty: the same as a number.
        dtype: of tau.
    """
    grad_tau = torch.empty((1,), dtype=dtype, device=mu.device)
    n = mu.numel()
    wrap_triton(_direct)[(1,)](
        packed(mu), packed(a), packed(mask), pull, penalty, grad_tau, n,
        BLOCK=block_of(n, 16, 2048),
    )  # fmt: skip
    return grad_tau


@operation()
def pass_gain(
    grad: Tensor, out: Tensor, bias: Tensor | None, gain: Tensor, a: Tensor | None, needs_mu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of a gain w, from `grad` and `out`, `(..., C)`: the gradient of `out`, `(N, C)`;
    <gain G_i, w_i>; and that of `gain`.

    The last two in parts that add up, `(parts, N)` and `(parts, C)`, in float32.
    """
    grad, out = rows_of(grad), rows_of(out)
    n, channels = grad.shape
    grad_out = torch.empty((n, channels), dtype=grad.dtype, device=grad.device)
    block, width = block_of(n, 16, 32), block_of(channels, 16, 128)
    share = block * 4
    groups, across = triton.cdiv(n, share), triton.cdiv(channels, width)
    sums = torch.empty((groups, channels), dtype=torch.float32, device=grad.device)
    mu = sums.new_empty((across, n if needs_mu else 0))
    wrap_triton(_pass_gain)[(groups, across)](
        grad, out, packed(bias), packed(gain), packed(a), grad_out, mu if needs_mu else None, sums,
        n, grad.stride(0), out.stride(0), channels, share, ROWS=block, COLUMNS=width,
    )  # fmt: skip
    return grad_out, mu, sums
