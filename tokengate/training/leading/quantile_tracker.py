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
    share_at,
    shares_of,
)
from tokengate.kernels.precision import finest_dtype

# By which powers of its number a step is weighed: of so many steps so far that is an average over
# the last half, quarter, tenth and 28th. And by which one how far each of these was off.
_POWERS, _MEMORY = (1.0, 3.0, 9.0, 27.0), 3.0
# How many octaves below and above the line a distribution is known.
_REACH = 16
# How many octaves of the way a line may go on at most: a tiny rate tells nothing of a large one.
_AHEAD = 2.0


class QuantileTracker:
    """Averages over steps of `counts` of scores (`score_counts`), from which quantiles are told.

    Scores grow with M(x), quickly at first. An average of their quantiles would lag behind, and
    more so the fewer steps there are. So their size, the median of those above 0, is followed by a
    line in log size over the log of the way that the optimiser has gone, the sum of its learning
    rates (of steps, where all are 0); at first M(x) is as large as that, later grows more slowly,
    and no more where the rate falls to 0. And their distribution relative to what the line had
    foretold is averaged: where the line is off for long, the distribution makes up for it.

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
        self.dtype = finest_dtype(device)
        self._weights = None if weights is None else weights.to(self.dtype).unsqueeze(-1)
        self._powers = torch.tensor(_POWERS, dtype=self.dtype, device=device).unsqueeze(-1)
        zeros = torch.zeros(len(_POWERS), series, dtype=self.dtype, device=device)
        # Of each average: the shares that are 0, lie below the edges of bins relative to the line
        # (the outermost bins have what is beyond them, too), are finite, and are anything: 1.
        edges = 2 * _REACH * PER_OCTAVE + 1
        self._shapes = zeros.unsqueeze(-1).repeat(1, 1, edges + 1)
        # Of the line: how many steps tell of it, the weight of these, their averages of log2 of the
        # way and of the size, the variance of the one and the covariance of both.
        self._line = zeros.repeat(6, 1, 1)
        # How far the optimiser has come when each is seen next, and how far it went last.
        self._way, self._went = zeros[0].clone(), zeros[0, :1].clone()
        # Sums of squares of how far the quantiles were off.
        self._errors = zeros if weights is None else zeros[:, :1].clone()
        self._edges = torch.arange(edges, dtype=self.dtype, device=device)

    def add(self, counts: Tensor, wanted: float, moves: float | Tensor = 1.0) -> None:
        """Those of a step, `(series, BINS)`; a series without any learns nothing.

        Args:
            counts: of the scores; their sum is what the step weighs: 1 in most steps, or in a
                mixture a number in proportion to the weight.
            wanted: the share whose quantile was asked for.
            moves: how far the optimiser goes in this step, after which the next one is seen.
        """
        weighs = counts.sum(-1)
        counts = shares_of(counts)
        below = counts.cumsum(-1)
        above_0 = counts.clone()
        above_0[..., 0] = above_0[..., -1] = 0
        some = above_0.sum(-1) > 0
        size = torch.where(some, log_quantile(above_0, 0.5), 0)
        told, total, x, y, xx, xy = self._line
        self._judge(below, weighs, wanted, some & (told >= 2), told + 1)
        at = torch.where(told < 2, size, self._size())
        told = told + 1
        went = torch.where(self._went > 0, self._went, moves)
        way = torch.where(self._way > 0, self._way, went)
        place = _place(way, told)
        # Steps without a rate are no part of a line over the way.
        begins = (self._way == 0) & (way > 0)
        x, xx, xy = torch.where(begins, place, x), xx * ~begins, xy * ~begins
        total = (1 - 1 / told) ** self._powers * total + weighs
        weight = weighs / torch.where(total > 0, total, 1)
        dx, dy = place - x, size - y
        rest = 1 - weight
        line = [told, total, x + weight * dx, y + weight * dy]
        line += [rest * (xx + weight * dx * dx), rest * (xy + weight * dx * dy)]
        self._line = torch.where(some, torch.stack(line), self._line)
        self._way, self._went = torch.where(some, way + moves, self._way), 0 * self._went + moves
        first = (at - _REACH - LOW) * PER_OCTAVE
        below = below.expand(*at.shape, -1)
        here = share_at(below[..., :-1], first.unsqueeze(-1) + self._edges[1:-1])
        here = torch.cat([below[..., :1], here, below[..., -2:]], -1)
        self._shapes.lerp_(here, weight.unsqueeze(-1))  # of no weight it stays to the bit

    def quantile(self, share: float) -> Tensor:
        """log2 of the score below which `share` lies at the next step, `(series,)` or `(1,)`.

        Where `share` and more are 0, it is the least score that there is, or none, whichever is
        nearer; none while all are.
        """
        return self._believed(self._quantiles(share))

    def share_below(self, log_scores: Tensor) -> Tensor:
        """The share that lies below these at the next step, on average over what was counted."""
        shares = self._foretold(log_scores.unsqueeze(-1)).squeeze(-1)
        return mean_of_counted(self._believed(shares), self._shapes[0])

    def _judge(
        self, below: Tensor, weighs: Tensor, wanted: float, known: Tensor, steps: Tensor
    ) -> None:
        """Remember how far off the quantiles of each average are that were told of this step."""
        if self._weights is not None:
            below = (below * weighs.unsqueeze(-1)).sum(0, keepdim=True) / weighs.sum()
            known, steps = known.any(-1, keepdim=True), steps.amax(-1, keepdim=True)
        places = (self._quantiles(wanted).unsqueeze(-1) - LOW) * PER_OCTAVE
        found = share_at(below[..., :-1].expand(len(places), -1, -1), places).squeeze(-1)
        off = torch.where(known, found - wanted, 0)
        self._errors = (1 - 1 / steps) ** _MEMORY * self._errors + off.square()

    def _believed(self, values: Tensor) -> Tensor:
        """Of each series, of `(averages, series)`, that of the average which was off least."""
        return values.gather(0, self._errors.argmin(0, keepdim=True)).squeeze(0)

    def _quantiles(self, share: float) -> Tensor:
        """Of each average the quantile at the next step: its octave, then the place in that."""
        octaves = self._edges[: (BINS - 2) // PER_OCTAVE + 1] + LOW
        wanted = torch.full_like(self._errors, share).unsqueeze(-1)
        octave = torch.searchsorted(self._foretold(octaves), wanted).clamp(1, len(octaves) - 1) - 1
        scores = LOW + octave + self._edges[: PER_OCTAVE + 1] / PER_OCTAVE
        shares = self._foretold(scores)
        above = torch.searchsorted(shares, wanted).clamp(1, PER_OCTAVE)
        low, high = shares.gather(-1, above - 1), shares.gather(-1, above)
        part = (wanted - low) / torch.where(high > low, high - low, 1)
        found = scores.gather(-1, above - 1) + part.clamp(0, 1) / PER_OCTAVE
        zero = self._mixed(self._shapes[..., :1])
        nearer = (zero > share) & (zero < min(1 - 1e-9, 2 * share))
        nothing = (zero >= share) | (wanted <= 0) | (shares[..., -1:] <= 0)
        return torch.where(nearer, LOW, torch.where(nothing, -torch.inf, found)).squeeze(-1)

    def _foretold(self, log_scores: Tensor) -> Tensor:
        """The shares that lie below these at the next step: `(..., Q) -> (averages, series, Q)`.

        In a mixture `series` is 1; a distribution that is not known yet has no part in it.
        """
        places = (log_scores - self._size().unsqueeze(-1) + _REACH) * PER_OCTAVE
        return self._mixed(share_at(self._shapes[..., :-1], places))

    def _mixed(self, shares: Tensor) -> Tensor:
        if self._weights is None:
            return shares
        weights = self._weights * self._shapes[..., -1:]
        total = weights.sum(1, keepdim=True)
        return (shares * weights).sum(1, keepdim=True) / torch.where(total > 0, total, 1)

    def _size(self) -> Tensor:
        """log2 of the size at the next step."""
        told, _, x, y, xx, xy = self._line
        slope = xy / torch.where(xx > 0, xx, 1)
        found: Tensor = y + slope * (_place(self._way, told + 1) - x).clamp(max=_AHEAD)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        names = ("shapes", "line", "errors", "way", "went")
        return {name: getattr(self, f"_{name}") for name in names}


def _place(way: Tensor, steps: Tensor) -> Tensor:
    """Where on the line that is: log2 of the way, or of the steps where there was none."""
    return torch.where(way > 0, way, steps).log2()
