"""Dropout whose mask is nowhere: each element asks a counter and a seed whether it is kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokengate.kernels.triton.launching import operation, wrap_triton


@triton.jit
def _thin(x, into, y, seed, n, share, scale, BLOCK: tl.constexpr):
    # One call of the generator has the numbers of four elements.
    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second, third, fourth = tl.randint4x(tl.load(seed), counter)
    at = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, BLOCK)
    _thin_block(x, into, y, n, share, scale, at, first)
    _thin_block(x, into, y, n, share, scale, at + BLOCK, second)
    _thin_block(x, into, y, n, share, scale, at + 2 * BLOCK, third)
    _thin_block(x, into, y, n, share, scale, at + 3 * BLOCK, fourth)


@triton.jit
def _thin_block(x, into, y, n, share, scale, at, number):
    here = at < n
    value = tl.load(x + at, here, 0.0).to(tl.float32)
    # A selection: what is dropped is 0, whatever it was.
    value = tl.where(tl.uint_to_uniform_float(number) >= share, value * scale, 0.0)
    if into is not None:
        value += tl.load(into + at, here, 0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), here)


def _write(x: Tensor, into: Tensor | None, y: Tensor, seed: Tensor, share: float) -> None:
    n = x.numel()
    grid = (triton.cdiv(n, 1024),)
    wrap_triton(_thin)[grid](x.contiguous(), into, y, seed, n, share, 1 / (1 - share), BLOCK=256)


@operation()
def thin(x: Tensor, seed: Tensor, share: float) -> Tensor:
    """x / (1 - share) with 0 at a `share` of its elements, the same ones for the same `seed`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _write(x, None, y, seed, share)
    return y


@operation("into")
def add_thinned_(into: Tensor, x: Tensor, seed: Tensor, share: float) -> None:
    """Add `thin(x, seed, share)` to `into`, which is contiguous."""
    _write(x, into, into, seed, share)
