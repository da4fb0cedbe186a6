"""How often each score was seen, in bins of equal width in its logarithm.

Counts add up over micro-batches and ranks to the bit. So a quantile over all positions of a step
takes no list of them, and no more memory for more positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokengate.gates.tally import by_sample, weights_of

# 32 bins to an octave, 2.2 % each, from 2^-64 to 2^32; before them one for what is smaller, 0 among
# it, and behind them one for what is larger, infinite or no number, and so never closed.
PER_OCTAVE, LOW, _OCTAVES = 32, -64, 96
BINS = PER_OCTAVE * _OCTAVES + 2


def no_counts(device: torch.device) -> Tensor:
    """`(BINS,)`, of zeros; float64 where there is, so that sums are exact in any order."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(BINS, dtype=dtype, device=device)


@torch.no_grad()
def count_scores(into: Tensor, scores: Tensor, mask: Tensor | None) -> None:
    """Add the real positions to `into`, `(BINS,)`; those of a sample weigh 1 together (eq. 23).

    Args:
        into: written in place, so that compiled code may do it, too.
        scores: >= 0, `(B, ...)`, samples first.
        mask: `(B, T)`, 0 where a position is padding; None for none.
    """
    _, real = by_sample(scores == 0, mask)
    place = ((scores.detach().to(into.dtype).log2() - LOW) * PER_OCTAVE).floor() + 1
    # What is no number, too, leaves a gate open.
    index = place.nan_to_num(BINS, BINS, 0).clamp(0, BINS - 1).long()
    into.index_add_(0, index.reshape(-1), weights_of(real).to(into.dtype).reshape(-1))


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
    total = counts.sum(-1)
    place = ((log_score.unsqueeze(-1) - LOW) * PER_OCTAVE + 1).clamp(0, BINS - 1)
    at = place.floor().long()
    before = counts.cumsum(-1).gather(-1, at) - counts.gather(-1, at)
    below = (before + counts.gather(-1, at) * (place - at)).squeeze(-1)
    return below / torch.where(total > 0, total, 1)
