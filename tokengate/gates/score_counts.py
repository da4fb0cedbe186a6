"""How often each score was seen, in bins of equal width in its logarithm.

Counts add up over micro-batches and ranks to the bit. So a quantile over all positions of a step
takes no list of them, and no more memory for more positions. In training that is a tensor of all
bins, which compiled code can write to; `training`'s `seen_scores` divides each of the same bins.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokengate.gates.tally import by_sample, weights_of
from tokengate.kernels.precision import finest_dtype

# 32 bins to an octave, 2.2 % each, from 2^-64 to 2^32; before them one for what is smaller, 0 among
# it, and behind them one for what is larger, infinite or no number, and so never closed.
PER_OCTAVE, LOW = 32, -64
BINS = PER_OCTAVE * 96 + 2


def no_counts(device: torch.device) -> Tensor:
    """`(BINS,)`, of zeros; float64 where there is, so that sums are exact in any order."""
    return torch.zeros(BINS, dtype=finest_dtype(device), device=device)


@torch.no_grad()
def count_scores(into: Tensor, scores: Tensor, mask: Tensor | None) -> None:
    """Add the real positions to `into`, `(BINS,)`; those of a sample weigh 1 together (eq. 23).

    Args:
        into: written in place, so that compiled code may do it, too.
        scores: >= 0, `(B, ...)`, samples first.
        mask: `(B, T)`, 0 where a position is padding; None for none.
    """
    _, real = by_sample(scores == 0, mask)
    index = bins_of(scores.detach().to(into.dtype))
    into.index_add_(0, index.reshape(-1), weights_of(real).to(into.dtype).reshape(-1))


def bins_of(scores: Tensor, parts: int = 1) -> Tensor:
    """The number of each score's bin, or of its part, of so many: `(...) -> (...)`."""
    place = ((scores.log2() - LOW) * (parts * PER_OCTAVE)).floor() + 1
    last = parts * (BINS - 2) + 1
    # What is no number, too, leaves a gate open.
    return place.nan_to_num(last, last, 0).clamp(0, last).long()


def shares_of(counts: Tensor) -> Tensor:
    """In each bin the share of all that was counted; 0 where nothing was: `(..., BINS)`."""
    total = counts.sum(-1, keepdim=True)
    return counts / torch.where(total > 0, total, 1)


def log_quantile(counts: Tensor, share: Tensor | float) -> Tensor:
    """log2 of the score below which a share of what was counted lies, `(..., BINS) -> (...)`.

    Within a bin as if it were filled evenly. -inf where that is in the first bin: then no score
    above 0 is known below which so many lie, and nothing is to be closed.
    """
    total = counts.sum(-1, keepdim=True)
    below = counts.cumsum(-1)
    wanted = torch.as_tensor(share, dtype=counts.dtype, device=counts.device) * total
    # The first bin up to which there are as many, and how far into it.
    at = torch.searchsorted(below, wanted).clamp(max=BINS - 2)
    inside = counts.gather(-1, at)
    part = (wanted - below.gather(-1, at) + inside) / torch.where(inside > 0, inside, 1)
    found = (at - 1 + part.clamp(0, 1)) / PER_OCTAVE + LOW
    return torch.where((at == 0) | (wanted <= 0), -torch.inf, found).squeeze(-1)


def share_below(counts: Tensor, log_score: Tensor) -> Tensor:
    """The share of what was counted that lies below a score: `(..., BINS), (...) -> (...)`."""
    below = functional.pad(counts.cumsum(-1), (1, 0))
    place = (log_score.unsqueeze(-1) - LOW) * PER_OCTAVE + 1
    place = place.nan_to_num(0).clamp(max=BINS - 1)  # no number is below one that is none
    total = counts.sum(-1)
    return share_at(below, place).squeeze(-1) / torch.where(total > 0, total, 1)


def share_at(below: Tensor, places: Tensor) -> Tensor:
    """The share below a place, of those `below` edges, `(..., E), (..., Q) -> (..., Q)`.

    Places count edges, from 0; between two of them a bin is filled evenly. Below -inf nothing is.
    """
    last = below.shape[-1] - 1
    inside = places.clamp(0, last)
    low = inside.floor().clamp(max=last - 1)
    at = low.long()
    found = torch.lerp(below.gather(-1, at), below.gather(-1, at + 1), inside - low)
    return torch.where(places == -torch.inf, 0, found)


def mean_of_counted(shares: Tensor, counts: Tensor) -> Tensor:
    """The mean of those shares of what has counted anything, or 0: `(S,), (S, BINS) -> ()`."""
    some = counts.sum(-1) > 0
    return (shares * some).sum() / some.sum().clamp(min=1)
