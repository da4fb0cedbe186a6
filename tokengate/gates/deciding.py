"""One call of a layer: where its gate lets the change act, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokengate.gates.base import Gate
from tokengate.gates.positions import Positions
from tokengate.kernels.change import Change
from tokengate.kernels.norms import Norms
from tokengate.kernels.recomputation import is_learnt_from


class Changed(NamedTuple):
    """What a call gave.

    Attributes:
        h: `(..., out_features)`.
        is_open: S, `(...)`; None without a gate.
        norms: of m and w, `(...)`, where they were asked for.
        scores: the gate's, `(...)`, where they are asked for or counted.
    """

    h: Tensor
    is_open: Tensor | None
    norms: tuple[Norms, Norms] | None
    scores: Tensor | None


def changed(
    change: Change,
    x: Any,
    real: Tensor | None,
    inside: Tensor | None,
    gate: Gate | None,
    wants_norms: bool = False,
    wants_scores: bool = False,
) -> Changed:
    """h of positions `(...)`.

    Args:
        change: M(x) beside the layer's output.
        x: the layer's input.
        real: 0 where a position counts in nothing, `(...)`; None where all do.
        inside: what restrictions allow, truths or weights, `(...)`; None for all.
        gate: which decides, or None.
        wants_norms: whether these are asked for.
        wants_scores: likewise; a gate may count them, too.
    """
    norms = change.norms() if wants_norms else None
    a = scores = None
    if gate is not None:
        a, scores = decided(gate, change, x, real, wants_scores)
    if inside is not None and inside.dtype != torch.bool:  # weights
        a = inside.to(change.dtype) * (1.0 if a is None else a)
    h = change.add(a)
    is_open = None if a is None else change.opened(a)
    if inside is not None:
        # A selection: outside it is the base, whatever M(x) and its gate are there.
        h = torch.where(inside.unsqueeze(-1) != 0, h, change.out)
        is_open = (inside != 0) if is_open is None else is_open & (inside != 0)
    return Changed(h, is_open, norms, scores)


def decided(
    gate: Gate, change: Change, x: Any, real: Tensor | None, wants_scores: bool = False
) -> tuple[Tensor, Tensor | None]:
    """a, `(...)`, and the gate's scores, `(...)`, where they are asked for or counted."""
    a: Tensor = gate(Positions(change, x, real))
    if not (wants_scores or (gate.counts_scores and is_learnt_from())):
        return a, None
    with torch.no_grad():
        return a, gate.scores(Positions(change.undropped(), x, real))


@dataclass(frozen=True, eq=False)
class Observer:
    """Who is told of each call of a layer.

    Attributes:
        tell: is given S, of shape (...), or None where there is no gate; the output, of shape
            (..., out_features); the padding mask of its positions, (B, T), or None; and the norms
            of m and of w in S's shape, or None where rows have adapters of their own or nobody
            wants them. The samples come first, also where the layer has them second.
        norms: whether these norms are wanted.
        scores: whether the gate's scores are wanted, too, as a fifth, in S's shape; where there is
            a gate.
        trained: whether only those calls are that a backward may come through.
        change: is given M(x) of each call, `(..., out_features)`, before it is added; of rows with
            adapters of their own, of one adapter after the other.
        experts: of a layer that has several experts, who is told of each; None for this one.
    """

    tell: Callable[..., None]
    _: KW_ONLY
    norms: bool = False
    scores: bool = False
    trained: bool = False
    change: Callable[[Tensor], None] | None = None
    experts: Callable[[int], Observer] | None = None

    def hear(self, *call: Any, scores: Tensor | None) -> None:
        """Tell of a call, if such are wanted; of its scores, if these are."""
        if not self.trained or is_learnt_from():
            self.tell(*call, *([scores] if self.scores else []))

    def of(self, expert: int) -> Observer:
        """Who is told of one expert of a layer that has several."""
        return self if self.experts is None else self.experts(expert)


def wanted(observers: Iterable[Observer]) -> tuple[bool, bool]:
    """Whether any of them wants norms, and scores."""
    norms = scores = False
    for observer in observers:
        norms, scores = norms or observer.norms, scores or observer.scores
    return norms, scores
