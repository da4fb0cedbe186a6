"""Experts that are folded: each of them is merged, dropped, or stays gated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tokengate.gates.base import Gate
from tokengate.layers.experts.gated_experts import GatedExperts
from tokengate.layers.folded import Folded, what_it_is, what_it_is_named
from tokengate.linears.merged_weight import merged_weight
from tokengate.methods.base import Modification


@dataclass
class FoldedExperts(Folded):
    """One projection of experts, of which none or some stay gated."""

    experts: tuple[int, ...]
    """Those it was patched for."""
    merged_experts: tuple[int, ...]
    kept: tuple[int, ...]
    live: tuple[Modification, Gate | None] | None
    """The parts of those that are kept, apart."""

    @property
    def is_plain(self) -> bool:
        return not self.kept

    def take_off(self) -> None:
        if self.live is None:
            super().take_off()
        else:
            self.layer.be_of(self.kept, *self.live)

    def put_on(self) -> None:
        if self.live is None:
            super().put_on()
            return
        self._take_back()
        self.layer.be_of(self.experts, self.modification, self.gate)

    def to_save(self) -> Folded | None:
        """What is merged and what is kept, in one; of what is merged the gate is open."""
        if not self.merged_experts:
            return None
        self._take_back()
        experts = tuple(sorted(self.merged_experts + self.kept))
        gate = _some(self.gate, self._numbers(experts)) if self.kept else None
        if gate is not None and gate.threshold is not None:
            merged = [experts.index(expert) for expert in self.merged_experts]
            gate.threshold.data[merged] = 0  # which no score is below
        modification = _some(self.modification, self._numbers(experts))
        return replace(
            self, layer=self.layer.of(experts), modification=modification, gate=gate, live=None
        )

    def _take_back(self) -> None:
        """What those that are kept have learnt meanwhile is theirs."""
        parts = (None, None) if self.live is None else self.live
        for whole, part in zip((self.modification, self.gate), parts, strict=True):
            if part is not None:
                cast(Any, whole).take(part, self._numbers(self.kept))

    def _numbers(self, experts: Sequence[int]) -> list[int]:
        return [self.experts.index(expert) for expert in experts]


def experts_as_folded(
    layer: GatedExperts, actions: Sequence[str], merged: Tensor | None
) -> FoldedExperts:
    """What `layer` is to be.

    Args:
        layer: a patched projection.
        actions: "merged", "dropped" or "kept", for each of its experts.
        merged: the weights of those that are merged, `(experts, out_features, in_features)`.
    """

    def those(action: str) -> tuple[int, ...]:
        pairs = zip(layer.experts, actions, strict=True)
        return tuple(expert for expert, own in pairs if own == action)

    kept, live = those("kept"), None
    if kept:
        numbers = [layer.experts.index(expert) for expert in kept]
        live = _some(layer.modification, numbers), _some(layer.gate, numbers)
    # A layer of those alone, whose rows are written over.
    weight = None if merged is None else merged_weight(cast(Any, layer.of(those("merged"))), merged)
    return FoldedExperts(
        *what_it_is(layer), weight, *what_it_is_named(layer),
        layer.experts, those("merged"), kept, live,
    )  # fmt: skip


@torch.no_grad()
def _some(module: Any, numbers: Sequence[int]) -> Any:
    """Some of the layers of a `Stacked` module, apart; None stays None."""
    return None if module is None else module.some(numbers)
