"""What eq. 23 counts: of each sample the share of its positions that were left unmodified."""

from __future__ import annotations

import torch
from torch import Tensor

from tokengate.kernels.precision import finest_dtype

# Shares are rounded to multiples of it, so that up to 2^23 of them add up exactly in any order.
_GRAIN = 2.0**-30


def by_sample(is_open: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """S and a padding mask as which positions are closed and which are real, both `(B, T)`.

    S of shape (B, ...) is that of B samples; (N,) that of N samples of one position, whose mean is
    that of samples of equal length.
    """
    if mask is not None:
        return ~is_open.reshape(mask.shape), mask != 0
    closed = ~(is_open.flatten(1) if is_open.dim() > 1 else is_open.reshape(-1, 1))
    return closed, torch.ones_like(closed)


def weights_of(real: Tensor) -> Tensor:
    """What each position weighs, so that those of a sample weigh 1: `(B, T) -> (B, T)`.

    Padding weighs 0. In whole grains, so that their sums are exact.
    """
    own = real.to(finest_dtype(real.device))
    return (own / own.sum(1, keepdim=True).clamp(min=1) / _GRAIN).round() * _GRAIN


def tally(closed: Tensor, real: Tensor) -> Tensor:
    """Samples, the sum of their sparsities, positions, closed positions: `(B, T), (B, T) -> (4,)`.

    Of the real positions alone. Tallies add up.
    """
    dtype = finest_dtype(closed.device)
    counts = real.sum(1, dtype=dtype)
    closed_counts = (closed & real).sum(1, dtype=dtype)
    # A sample of padding alone is none.
    samples = (counts > 0).sum(dtype=dtype)
    shares = (closed_counts / counts.clamp(min=1) / _GRAIN).round() * _GRAIN
    return torch.stack([samples, shares.sum(), counts.sum(), closed_counts.sum()])


def whole_grains(shares: float) -> float:
    """The sum of shares of a tally, of which their average times their number may fall short."""
    return round(shares / _GRAIN) * _GRAIN
