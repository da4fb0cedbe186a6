"""Sparsity of each sample, and at each place in the sequence."""

from __future__ import annotations

import math
from array import array

import torch
from torch import Tensor


class PositionCounts:
    """What was counted of one module, of one call after the other.

    Attributes:
        by_sample: the sparsity of each sample (eq. 23); NaN of one without a position.
        real: the positions at each place in the sequence, `(T,)`; padding is at no place, and what
            comes after it on the left begins at the first.
        closed: those of them that were left unmodified, `(T,)`.
    """

    def __init__(self) -> None:
        self.by_sample: array[float] = array("d")
        self.real = self.closed = torch.zeros(0, dtype=torch.long)

    def add(self, closed: Tensor, real: Tensor) -> None:
        """Count a call: `(B, T), (B, T)` on the CPU."""
        closed = closed & real
        lengths, closed_counts = real.sum(1).tolist(), closed.sum(1).tolist()
        self.by_sample.extend(
            c / n if n else math.nan for c, n in zip(closed_counts, lengths, strict=True)
        )
        place = real.cumsum(1) - 1
        self.real = _sum(self.real, torch.bincount(place[real]))
        self.closed = _sum(self.closed, torch.bincount(place[closed]))

    def extend(self, later: PositionCounts) -> None:
        """Count what was counted elsewhere, as if it had come after."""
        self.by_sample.extend(later.by_sample)
        self.real = _sum(self.real, later.real)
        self.closed = _sum(self.closed, later.closed)

    def by_position(self) -> tuple[tuple[int, int], ...]:
        """The positions, and those of them that were modified, at each place in the sequence."""
        modified = _sum(self.real, -self.closed)
        return tuple(zip(self.real.tolist(), modified.tolist(), strict=True))


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Of `(N,)` and `(M,)`, where what is not there is 0."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    total = longer.clone()
    total[: len(shorter)] += shorter
    return total
