"""Quantiles of what changes from step to step: its size and its distribution apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengate.gates.score_counts import (
    BINS,
    LOW,
    PER_OCTAVE,
    log_quantile,
    mean_of_counted,
    share_below,
    shares_of,
)

# By which powers of its number a step is weighed: of so many steps so far that is an average over
# the last half, quarter, tenth and 28th. And by which one how far each of these was off.
_POWERS, _MEMORY = (1.0, 3.0, 9.0, 27.0), 3.0


class QuantileTracker:
    """Averages over steps of `counts` of scores (`score_counts`), from which quantiles are told.

    Scores grow with M(x), quickly at first. An average of their quantiles would lag behind, and
    more so the fewer steps there are. So their size, the median of those above 0, is followed by a
    line in log size over log steps; at first M(x) is as large as steps are many, and later grows
    more slowly. And their distribution relative to what the line had foretold is averaged: where
    the line is off for long, the distribution makes up for it.

    How many steps are worth averaging depends on how many positions a step has and on how the
    scores change. So there are averages over several shares of the steps so far, from a half to a
    28th, and for each it is known how far its quantiles were off in the steps that came after
    them. That which was off least is believed.

    Where one quantile of all is wanted, each distribution is followed by itself none the less, and
    what is foretold of them is mixed: they do not grow alike, and the line of a mixture would lag
    behind as long as one of them overtakes the others.

    Args:
        series: how many distributions are followed.
        device: where.
        weights: that each has in the mixture of which quantiles are told, `(series,)`; None to tell
            them of each.
    """

    def __init__(self, series: int, device: torch.device, weights: Tensor | None = None) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self._weights = None if weights is None else weights.to(self.dtype).unsqueeze(-1)
        self._powers = torch.tensor(_POWERS, dtype=self.dtype, device=device).unsqueeze(-1)
        zeros = torch.zeros(len(_POWERS), series, dtype=self.dtype, device=device)
        # Of each average: shares by bin, relative to the line.
        self._shapes = zeros.unsqueeze(-1).repeat(1, 1, BINS)
        # Of the line: how many steps tell of it, the weight of these, their averages of log2 of the
        # step and of the size, the variance of the one and the covariance of both.
        self._line = zeros.repeat(6, 1, 1)
        # Of each average: the shares by bin that it foretells of the next step, mixed or of each.
        self._foretold = self._next()
        # Sums of squares of how far the quantiles were off.
        self._errors = torch.zeros_like(self._foretold[..., 0])

    def add(self, counts: Tensor, wanted: float) -> None:
        """Those of a step, `(series, BINS)`; a series without any learns nothing.

        Args:
            counts: of the scores; their sum is what the step weighs: 1 in most steps, or in a
                mixture a number in proportion to the weight.
            wanted: the share whose quantile was asked for.
        """
        weighs = counts.sum(-1)
        told, total, x, y, xx, xy = self._line
        some = (counts[..., 1:-1].sum(-1) > 0).expand_as(told)
        self._judge(counts, wanted, some & (told >= 2), told + 1)
        counts = shares_of(counts).expand_as(self._shapes)
        above = counts.clone()
        above[..., 0] = above[..., -1] = 0
        size = torch.where(some, log_quantile(above, 0.5), 0)
        at = torch.where(told < 2, size, self._size())
        told = told + 1
        total = (1 - 1 / told) ** self._powers * total + weighs
        weight = weighs / torch.where(total > 0, total, 1)
        dx, dy = told.log2() - x, size - y
        rest = 1 - weight
        line = [told, total, x + weight * dx, y + weight * dy]
        line += [rest * (xx + weight * dx * dx), rest * (xy + weight * dx * dy)]
        self._line = torch.where(some, torch.stack(line), self._line)
        here = _moved(counts, -at)
        mixed = self._shapes + weight.unsqueeze(-1) * (here - self._shapes)
        self._shapes = torch.where(weighs.unsqueeze(-1) > 0, mixed, self._shapes)
        self._foretold = self._next()

    def quantile(self, share: float) -> Tensor:
        """log2 of the score below which `share` lies at the next step, `(series,)` or `(1,)`.

        Where `share` and more are 0, it is the least score that there is, or none, whichever is
        nearer; none while all are.
        """
        return self._believed(self._quantiles(share))

    def share_below(self, log_scores: Tensor) -> Tensor:
        """The share that lies below these at the next step, on average over what was counted."""
        shares = self._believed(share_below(self._foretold, log_scores.expand_as(self._errors)))
        return mean_of_counted(shares, self._foretold[0])

    def _judge(self, counts: Tensor, wanted: float, known: Tensor, steps: Tensor) -> None:
        """Remember how far the quantiles of each average were off, of what was foretold."""
        if self._weights is not None:
            counts = counts.sum(0, keepdim=True)
            known, steps = known.any(-1, keepdim=True), steps.amax(-1, keepdim=True)
        seen = share_below(counts.expand_as(self._foretold), self._quantiles(wanted))
        off = torch.where(known, seen - wanted, 0)
        self._errors = (1 - 1 / steps) ** _MEMORY * self._errors + off.square()

    def _believed(self, values: Tensor) -> Tensor:
        """Of each series, of `(averages, series)`, that of the average which was off least."""
        return values.gather(0, self._errors.argmin(0, keepdim=True)).squeeze(0)

    def _quantiles(self, share: float) -> Tensor:
        zero = self._foretold[..., 0]
        nearer = (zero > share) & (zero < min(1 - 1e-9, 2 * share))
        return torch.where(nearer, float(LOW), log_quantile(self._foretold, share))

    def _next(self) -> Tensor:
        """The shares by bin at the next step, `(averages, series, BINS)` or `(averages, 1, BINS)`.

        A distribution that is not known yet has no part in a mixture.
        """
        each = _moved(self._shapes, self._size())
        if self._weights is None:
            return each
        return shares_of((each * self._weights).sum(1, keepdim=True))

    def _size(self) -> Tensor:
        """log2 of the size at the next step."""
        told, _, x, y, xx, xy = self._line
        slope = xy / torch.where(xx > 0, xx, 1)
        found: Tensor = y + slope * ((told + 1).log2() - x)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self._foretold = self._next()

    def _tensors(self) -> dict[str, Tensor]:
        return {"shapes": self._shapes, "line": self._line, "errors": self._errors}


def _moved(counts: Tensor, by: Tensor) -> Tensor:
    """Counts of scores that are all multiplied by 2^`by`: `(..., BINS), (...)`.

    The first and the last bin stay; what would leave the others stays in the outermost of them.
    """
    inner = counts[..., 1:-1]
    bins = by.unsqueeze(-1) * PER_OCTAVE
    low = bins.floor()
    at = torch.arange(inner.shape[-1], device=counts.device) + low.long()
    moved = torch.zeros_like(inner)
    last = inner.shape[-1] - 1
    moved.scatter_add_(-1, at.clamp(0, last), inner * (1 - (bins - low)))
    moved.scatter_add_(-1, (at + 1).clamp(0, last), inner * (bins - low))
    return torch.cat([counts[..., :1], moved, counts[..., -1:]], -1)
