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
        # Whether an expert's rows are in the order of the positions, and not of choices first.
        self._by_position: bool | None = None
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

    def places(self, whose: Whose, x: Tensor) -> Tensor | None:
        """The position of each row of `x`, `(N,)`, counted in `positions`; None if not known."""
        rows = len(x)
        if whose.rows is not None:
            return torch.arange(rows, device=self.states.device) % whose.rows
        index = self.index
        if index is None:
            return None
        if whose.expert is not None:
            return self._of_expert(whose.expert, index, x)
        if index.numel() != rows:
            return None
        each = index.shape[-1]
        if whose.ids is not None:
            return torch.arange(rows, device=index.device) // each
        return index.reshape(-1).sort().indices // each

    def _of_expert(self, expert: Any, index: Tensor, x: Tensor) -> Tensor | None:
        by_choice: Tensor = (expert == index.T).nonzero()[:, 1]  # as transformers' own code picks
        if len(by_choice) != len(x):
            return None
        by_position: Tensor = (index == expert).nonzero()[:, 0]
        flat = self.states.reshape(-1, self.states.shape[-1])
        if self._by_position is None and x.shape[1] == flat.shape[1]:
            one, other = (torch.equal(x, flat[at]) for at in (by_choice, by_position))
            self._by_position = other if one != other else None
        return by_position if self._by_position else by_choice
