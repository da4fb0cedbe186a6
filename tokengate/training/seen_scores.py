"""The scores of a layer in a pass over batches, and the threshold that closes a share of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from tokengate.gates.score_counts import BINS, LOW, PER_OCTAVE, bins_of
from tokengate.kernels.norms import Norms
from tokengate.sharding import in_processes

# Into how many parts each bin of training is divided, 0.07 % each.
_PARTS = 32
# How far from the share asked for is not worth a word.
_NEAR = 0.1

_Place = TypeVar("_Place", float, Tensor)


class SeenScores:
    """The scores of one layer, of one expert or of all, in bins: those in which something was.

    Attributes:
        bins: which, `(K,)`, ascending; `FIRST` and `LAST` are for what is smaller, and larger.
        weights: how much was seen in each, `(K,)`.
        heaviest: the weight of one position.
    """

    FIRST, LAST = 0, _PARTS * (BINS - 2) + 1

    def __init__(self) -> None:
        self.bins, self.weights = torch.zeros(0).long(), torch.zeros(0).double()
        self.heaviest = 0.0

    @classmethod
    def of(cls, several: Iterable[SeenScores]) -> SeenScores:
        """What all have seen."""
        found = cls()
        for each in several:
            found._include(each.bins, each.weights, each.heaviest)
        return found

    @classmethod
    def together(cls, several: Iterable[SeenScores]) -> SeenScores:
        """What all have seen, each of them as much."""
        found = cls()
        for each in several:
            found._include(each.bins, each.weights / each.total, each.heaviest / each.total)
        return found

    def _include(self, bins: Tensor, weights: Tensor, heaviest: float) -> None:
        """Count what was seen in `bins`, `(...)` both, of whose positions one weighs most."""
        all_bins = torch.cat([self.bins, bins])
        self.bins, at = all_bins.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        both = torch.cat([self.weights, weights])
        self.weights = torch.zeros(len(self.bins)).double().index_add(0, at, both)
        self.heaviest = max(self.heaviest, heaviest)

    def add(self, scores: Tensor, weights: Tensor) -> None:
        """Count scores >= 0, `(...)`, by their `weights`, `(...)`, on the CPU; 0 is nothing."""
        some = weights > 0
        new = bins_of(scores[some].double(), _PARTS)
        self._include(new, weights[some].double(), weights.max().item())

    def listen(self, of_m: Norms, of_w: Norms, weights: Tensor, scores: Tensor) -> None:
        """One call's, as `measure` tells them."""
        self.add(scores.cpu(), weights.cpu())

    @property
    def total(self) -> float:
        """The weight of all that was seen."""
        return self.weights.sum().item()

    def moved(self) -> bool:
        """Whether r was above 0 anywhere."""
        return bool((self.bins > self.FIRST).any())

    def threshold(self, share: float) -> tuple[float, float]:
        """A tau, and the share that it closes, as near to `share` as these positions allow.

        It lies between two ratios that were seen, or just beyond the last on a side.
        """
        closable = self.bins < self.LAST
        at = self.bins[closable]
        if share == 0 or not len(at) or at[-1] == self.FIRST:
            return 0.0, 0.0
        sums = self.weights[closable].cumsum(0)
        closed = torch.cat([torch.zeros(1), sums]) / self.total
        nearest = int((closed - share).abs().argmin())
        if nearest == 0 and at[0] == self.FIRST:
            return 0.0, 0.0
        around = torch.cat([at[:1] - 2, at, at[-1:] + 2])
        between = (around[nearest] + around[nearest + 1] + 1).item() / 2
        return self.score_at(between), closed[nearest].item()

    @staticmethod
    def score_at(place: _Place) -> _Place:
        """The score so far into the bins, of which each is 1 wide."""
        score: _Place = 2.0 ** ((place - 1) / (_PARTS * PER_OCTAVE) + LOW)
        return score

    def share_below(self, score: float) -> float:
        """The share that lies below a score, by the middles of bins."""
        middles = self.score_at(self.bins + 0.5)
        below = self.weights[(middles < score) & (self.bins < self.LAST)]
        return below.sum().item() / self.total

    def miss(self, share: float) -> str | None:
        """What keeps `threshold` from `share`, and where that leaves it; None if nothing does."""
        _, closed = self.threshold(share)
        unclosable = self.weights[self.bins == self.LAST].sum().item() / self.total
        if share > 1 - unclosable:
            reason = f"W0 x is 0, or next to it, at {percent(unclosable)}"
        elif abs(closed - share) > _NEAR and self._heaped():
            reason = "r is the same at many"
        else:
            return None
        return f"the nearest one closes {percent(closed)}, because {reason}"

    def _heaped(self) -> bool:
        """Whether some r that is not 0 alone was seen at more than one position."""
        return bool((self.weights.max() > 1.5 * self.heaviest) and self.moved())


def of_all_processes(seen: Mapping[str, SeenScores]) -> dict[str, SeenScores]:
    """What all of several processes have seen, each of which must ask."""
    parts = [seen]
    if in_processes():
        parts = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, dict(seen))
    return {name: SeenScores.of(part[name] for part in parts) for name in seen}


def percent(share: float) -> str:
    """A share as messages print it."""
    return f"{100 * share:.3g} %"
