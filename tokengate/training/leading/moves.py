"""How far an optimiser moves what gates decide on in a step: its learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tokengate.layers.gated_linear import Gated


class Moves:
    """The rates of the groups that hold parameters of modifications, or of all if none does.

    Args:
        layers: whose these are.
        device: where a rate is put that is a tensor.
    """

    def __init__(self, layers: Iterable[Gated], device: torch.device) -> None:
        self._modifications = [layer.modification for layer in layers]
        self._device = device
        self._groups: list[int] = []
        self._groups_of = 0

    def of(self, optimizer: torch.optim.Optimizer) -> float | Tensor:
        """Their sum, with 1 for a group without a rate."""
        groups = optimizer.param_groups
        if self._groups_of != len(groups):
            self._groups_of = len(groups)
            own = {id(p) for part in self._modifications for p in part.parameters()}
            holds = [any(id(p) in own for p in group["params"]) for group in groups]
            self._groups = [i for i, held in enumerate(holds) if held or not any(holds)]
        rates = [groups[i].get("lr") for i in self._groups]
        moves = sum(1.0 if rate is None else rate for rate in rates)
        return moves.to(self._device) if isinstance(moves, Tensor) else moves
