"""One call of a layer: where its gate lets the change act, within what restrictions allow."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokengate.gates.base import Gate
from tokengate.gates.positions import Positions
from tokengate.kernels.change import Change
from tokengate.kernels.norms import Norms


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
        positions = Positions(change, x, real)
        a = gate(positions)
        if wants_scores or (gate.counts_scores and gate.training):
            scores = gate.scores(positions)
    if inside is not None and inside.dtype != torch.bool:  # weights
        a = inside.to(change.dtype) * (1.0 if a is None else a)
    h = change.add(a)
    is_open = None if a is None else change.opened(a)
    if inside is not None:
        # A selection: outside it is the base, whatever M(x) and its gate are there.
        h = torch.where(inside.unsqueeze(-1) != 0, h, change.out)
        is_open = (inside != 0) if is_open is None else is_open & (inside != 0)
    return Changed(h, is_open, norms, scores)
