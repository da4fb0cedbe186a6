"""The scores of a layer in a pass over batches, and the threshold that closes a share of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tokengate.gates.score_counts import FineCounts
from tokengate.kernels.norms import Norms
from tokengate.sharding import in_processes

# How far from the share asked for is not worth a word.
_NEAR = 0.1


class SeenScores(FineCounts):
    """The scores of one layer, of one expert or of all."""

    @classmethod
    def of(cls, several: Iterable[SeenScores]) -> SeenScores:
        """What all have seen."""
        found = cls()
        for each in several:
            found.include(each.bins, each.weights, each.heaviest)
        return found

    @classmethod
    def together(cls, several: Iterable[SeenScores]) -> SeenScores:
        """What all have seen, each of them as much."""
        found = cls()
        for each in several:
            found.include(each.bins, each.weights / each.total, each.heaviest / each.total)
        return found

    def listen(self, of_m: Norms, of_w: Norms, weights: Tensor, scores: Tensor) -> None:
        """One call's, as `measure` tells them."""
        self.add(scores.cpu(), weights.cpu())

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
