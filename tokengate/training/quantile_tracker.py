"""A quantile of what changes from step to step: its size and its distribution apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengate.gates.score_counts import BINS, PER_OCTAVE, log_quantile

# Over what share of a training's steps is averaged, and the least and the largest weight of a step.
_WINDOW, _LEAST, _MOST = 0.05, 0.02, 0.5


class QuantileTracker:
    """Averages over steps of `counts` of scores (`score_counts`), from which quantiles are told.

    Scores grow with M(x), quickly at first. An average of their quantiles would lag behind, and
    more so the fewer steps there are. So their size, the median of those above 0, is followed with
    its growth (Holt's linear trend, in octaves), and their distribution relative to it is averaged.

    Args:
        series: how many distributions are followed.
        total_steps: of the training; how long is averaged follows from it.
        device: where.
    """

    def __init__(self, series: int, total_steps: int, device: torch.device) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        window = max(1.0, _WINDOW * total_steps)
        self._weight = min(_MOST, max(_LEAST, 1 / window))
        self._shape = torch.zeros(series, BINS, dtype=self.dtype, device=device)
        # The size of the last step, smoothed, its growth in a step, and how many steps tell of it.
        self._size = torch.zeros(series, dtype=self.dtype, device=device)
        self._growth = torch.zeros_like(self._size)
        self._told = torch.zeros_like(self._size)

    def add(self, counts: Tensor) -> None:
        """Those of a step, `(series, BINS)`; a series without any learns nothing."""
        above = counts.clone()
        above[:, 0] = above[:, -1] = 0
        some = above.sum(-1) > 0
        size = torch.where(some, log_quantile(above, 0.5), 0)
        first, second = self._told == 0, self._told == 1
        # Steps so far tell as much as they are, as in Adam's averages after their correction.
        weight = torch.clamp(1 / (self._told + 1), min=self._weight)
        expected = self._size + self._growth
        smoothed = torch.where(first, size, expected + weight * (size - expected))
        growth = self._growth + weight * (smoothed - self._size - self._growth)
        growth = torch.where(first, 0, torch.where(second, size - self._size, growth))
        smoothed = torch.where(second, size, smoothed)
        self._size = torch.where(some, smoothed, self._size)
        self._growth = torch.where(some, growth, self._growth)
        self._told += some
        total = counts.sum(-1, keepdim=True)
        here = _moved(counts / torch.where(total > 0, total, 1), -size)
        mixed = self._shape + weight.unsqueeze(-1) * (here - self._shape)
        self._shape = torch.where(total > 0, mixed, self._shape)

    def quantile(self, share: float) -> Tensor:
        """log2 of the score below which `share` lies at the next step, `(series,)`."""
        return log_quantile(self._shape, share) + self._size + self._growth

    def counts(self) -> Tensor:
        """Shares by bin, relative to the size, `(series, BINS)`."""
        return self._shape

    def relative(self, log_scores: Tensor) -> Tensor:
        """`log_scores`, `(series,)`, in the bins of `counts`, at the next step."""
        return log_scores - self._size - self._growth

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "shape": self._shape,
            "size": self._size,
            "growth": self._growth,
            "told": self._told,
        }


def _moved(counts: Tensor, by: Tensor) -> Tensor:
    """Counts of scores that are all multiplied by 2^`by`: `(series, BINS), (series,)`.

    The first and the last bin stay; what would leave the others stays in the outermost of them.
    """
    inner = counts[:, 1:-1]
    bins = by.unsqueeze(-1) * PER_OCTAVE
    low = bins.floor()
    at = torch.arange(inner.shape[-1], device=counts.device) + low.long()
    moved = torch.zeros_like(inner)
    last = inner.shape[-1] - 1
    moved.scatter_add_(-1, at.clamp(0, last), inner * (1 - (bins - low)))
    moved.scatter_add_(-1, (at + 1).clamp(0, last), inner * (bins - low))
    return torch.cat([counts[:, :1], moved, counts[:, -1:]], -1)
