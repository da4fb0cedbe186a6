"""Which position each row of a product is: what a call of a module of experts says of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokengate.layers.experts.products import Whose


class Routing:
    """One call of a module of experts.

    Args:
        args: that its forward is given: the positions' states, and often, as integers `(T, K)`,
            the experts of each.
        kwargs: likewise.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        #: The states, `(..., C)`.
        self.states = next(t for t in tensors if t.is_floating_point())
        integers = (t for t in tensors if not t.is_floating_point() and t.dim() > 1)
        self.index = next((t for t in integers if t.dtype != torch.bool), None)
        # What each patched projection makes of it, by its name.
        self.calls: dict[str, Any] = {}

    def is_empty(self) -> bool:
        """Whether nothing is routed to any expert."""
        return not (self.states.numel() and (self.index is None or self.index.numel()))

    def positions(self, whose: Whose, experts: int) -> Tensor:
        """The states of its positions, `(..., C)`, each once."""
        if whose.rows is None:
            return self.states
        # Every expert is given all positions, one expert after the other.
        flat = self.states.reshape(-1, self.states.shape[-1])
        return flat[: len(flat) // experts]

    def places(self, whose: Whose, rows: int) -> Tensor | None:
        """The position of each row, `(N,)`, counted in `positions`; None where it is not known."""
        if whose.rows is not None:
            return torch.arange(rows, device=self.states.device) % whose.rows
        index = self.index
        if index is None:
            return None
        if whose.expert is not None:
            found = (whose.expert == index.T).nonzero()[:, 1]  # as transformers' own code picks
            return found if len(found) == rows else None
        if index.numel() != rows:
            return None
        each = index.shape[-1]
        if whose.ids is not None:
            return torch.arange(rows, device=index.device) // each
        return index.reshape(-1).sort().indices // each
