"""How often values lie between edges."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengate.kernels.precision import finest_dtype

#: Those of r: four to the octave from 2^-24 to 2^16, which is 19 % from one to the next.
RATIO_EDGES = tuple(2.0 ** (quarter / 4) for quarter in range(-24 * 4, 16 * 4 + 1))
_RATIO_EDGES = torch.tensor(RATIO_EDGES)

# Of what has no edges of its own.
_BINS = 20


@dataclass(frozen=True)
class Histogram:
    """Counts of values between n edges, with those on both sides of them."""

    edges: tuple[float, ...]
    """n of them, ascending."""
    counts: tuple[int, ...]
    """n + 1: what is below the first edge, what is from one edge on and below the next, and what
    is from the last edge on."""

    @property
    def total(self) -> int:
        """How many values there are."""
        return sum(self.counts)


def histogram_of(values: Sequence[float]) -> Histogram:
    """Between the smallest and the largest of them, in bins of one width.

    What is not finite is beyond the edges, NaN above them.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    steps = {low + (high - low) * step / _BINS for step in range(_BINS)}
    edges = sorted({*steps, math.nextafter(high, math.inf)})
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[bisect.bisect_right(edges, value)] += 1
    return Histogram(tuple(edges), tuple(counts))


def count_ratios(ratios: Tensor | None, real: Tensor) -> Tensor:
    """How often r is where in `RATIO_EDGES`, of real positions: `(B, T), (B, T) -> (n + 1,)`.

    None, which was not measured, is nowhere. Counts add up.
    """
    dtype = finest_dtype(real.device)
    counts = torch.zeros(len(RATIO_EDGES) + 1, dtype=dtype, device=real.device)
    if ratios is None:
        return counts
    at = torch.bucketize(ratios.contiguous(), _RATIO_EDGES.to(ratios), right=True)
    return counts.index_add(0, at.flatten(), real.flatten().to(dtype))
