"""A linear layer of which the features are known, and no value."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tokengate.sharding import divided_as


def stand_in(in_features: int, out_features: int, of: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Beside which to make another of what `of` is, on its device; its weight takes no memory.

    All of it is NaN, so that what should have been read of a real one is seen.
    """
    own = [*of.parameters(recurse=False), *of.buffers(recurse=False)]
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    unknown = torch.full((), math.nan, dtype=dtype, device=own[0].device if own else None)
    linear.weight = nn.Parameter(unknown.expand(out_features, in_features), requires_grad=False)
    return linear


@torch.no_grad()
def write_over(tensors: Iterable[Tensor], fresh: Iterable[Tensor]) -> None:
    """Give `tensors` the values of those that another has in the same order."""
    for tensor, value in zip(tensors, fresh, strict=True):
        tensor.copy_(divided_as(value.to(tensor.device), tensor))
