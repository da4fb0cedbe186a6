"""A quantile of what changes from step to step: its size and its distribution apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengate.gates.score_counts import BINS, PER_OCTAVE, log_quantile

# Over what share of a training's steps is averaged, and over how many at least and at most.
_WINDOW, _LEAST, _MOST = 0.1, 2.0, 100.0


class QuantileTracker:
    """Averages over steps of `counts` of scores (`score_counts`), from which quantiles are told.

    Scores grow with M(x), quickly at first. An average of their quantiles would lag behind, and
    more so the fewer steps there are. So their size, the median of those above 0, is followed by a
    line in log size over log steps, to which later steps contribute more; at first M(x) is as large
    as steps are many, and later grows more slowly. And their distribution relative to it is
    averaged.

    Args:
        series: how many distributions are followed.
        total_steps: of the training; how long is averaged follows from it.
        device: where.
    """

    def __init__(self, series: int, total_steps: int, device: torch.device) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self._kept = 1 - 1 / min(_MOST, max(_LEAST, _WINDOW * total_steps))
        self._shape = torch.zeros(series, BINS, dtype=self.dtype, device=device)
        # Of the line: how many steps tell of it, the weight of these, their averages of log2 of the
        # step and of the size, the variance of the one and the covariance of both.
        self._line = torch.zeros(6, series, dtype=self.dtype, device=device)

    def add(self, counts: Tensor) -> None:
        """Those of a step, `(series, BINS)`; a series without any learns nothing."""
        above = counts.clone()
        above[:, 0] = above[:, -1] = 0
        some = above.sum(-1) > 0
        size = torch.where(some, log_quantile(above, 0.5), 0)
        told, total, x, y, xx, xy = self._line
        told = told + 1
        total = self._kept * total + 1
        weight = 1 / total
        dx, dy = told.log2() - x, size - y
        rest = 1 - weight
        line = [told, total, x + weight * dx, y + weight * dy]
        line += [rest * (xx + weight * dx * dx), rest * (xy + weight * dx * dy)]
        self._line = torch.where(some, torch.stack(line), self._line)
        counted = counts.sum(-1, keepdim=True)
        here = _moved(counts / torch.where(counted > 0, counted, 1), -size)
        mixed = self._shape + weight.unsqueeze(-1) * (here - self._shape)
        self._shape = torch.where(counted > 0, mixed, self._shape)

    def _size(self) -> Tensor:
        """log2 of the size at the next step."""
        told, _, x, y, xx, xy = self._line
        slope = xy / torch.where(xx > 0, xx, 1)
        found: Tensor = y + slope * ((told + 1).log2() - x)
        return found

    def quantile(self, share: float) -> Tensor:
        """log2 of the score below which `share` lies at the next step, `(series,)`."""
        return log_quantile(self._shape, share) + self._size()

    def counts(self) -> Tensor:
        """Shares by bin, relative to the size, `(series, BINS)`."""
        return self._shape

    def relative(self, log_scores: Tensor) -> Tensor:
        """`log_scores`, `(series,)`, in the bins of `counts`, at the next step."""
        return log_scores - self._size()

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {"shape": self._shape, "line": self._line}


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
