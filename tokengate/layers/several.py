"""Calls that several adapters share: each has rows of its own, or regions, which may overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tokengate.errors import TokenGateError
from tokengate.gates.base import Gate
from tokengate.gates.deciding import decided
from tokengate.kernels.change import Change
from tokengate.kernels.eager import is_exported
from tokengate.kernels.factors import Factors, Learn
from tokengate.kernels.gated_sum import without_bias
from tokengate.layers.calls import USE, in_decoder, said_of
from tokengate.layers.regions import Regional
from tokengate.methods.base import Modification

_BEAMS = (
    "; where generate has several beams or sequences of a row (num_beams, num_return_sequences), "
    "each name as often, side by side"
)


class Rows:
    """One adapter's name, or None for the base model, for each row of a batch.

    Args:
        names: as many as the batch has rows.

    Attributes:
        adapters: the names, each once.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)
        self.adapters = {name for name in self.names if name is not None}
        self._known: dict[tuple[int, torch.device], list[tuple[str, Tensor]]] = {}

    def of(self, input: Tensor, dim: int, mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """For each adapter, which places along `dim` of a layer's input are its own.

        A batch may come flattened, `(B T, in_features)`, if its padding mask `(B, T)` says so:
        otherwise positions could be any, as those that are routed to an expert. A decoder may have
        several beams of each row, side by side, where its encoder had the row once.

        Raises:
            TokenGateError: the batch has another number of rows.
        """
        count, rows = input.shape[dim], len(self.names)
        flattened = input.dim() == 2 and mask is not None and len(mask) == rows
        beams = in_decoder() and count % rows == 0
        if count != rows and not flattened and not beams:
            raise TokenGateError(
                f"tokengate.use was given adapters for {rows} rows, and a layer was called with "
                f"{count} (an input of shape {tuple(input.shape)}): pass one name, or None, for "
                f"each row of the batch{_BEAMS * (count % rows == 0)}."
            )
        key = (int(count), input.device)
        found = self._known.get(key)
        if found is None:
            each = [name for name in self.names for _ in range(count // rows)]
            places: dict[str, list[int]] = {}
            for place, name in enumerate(each):
                if name is not None:
                    places.setdefault(name, []).append(place)
            with torch.inference_mode(False):  # a later forward may be trained through
                found = [
                    (name, torch.tensor(own, device=input.device)) for name, own in places.items()
                ]
            if not is_exported():  # where tensors are the graph's
                self._known[key] = found
        return iter(found)


@dataclass(eq=False)
class Told:
    """What is said of one call of a layer, from around it.

    Attributes:
        choice: the name of an adapter, None for the base, or several: `Rows` or `Regional`.
        mask: the padding mask of its positions, `(B, T)`, or None.
        inside: what restrictions allow, in the shape of its positions, samples first; or None.
        parts: the same of each adapter's region, where there are several.
    """

    choice: Any
    mask: Tensor | None
    inside: Tensor | None
    parts: tuple[Tensor, ...]


def refuse_several(asked: str, patched: Mapping[str, Any]) -> None:
    """An error if rows or regions have adapters of their own here, where one is to be looked at."""
    if any(isinstance(c, Rows | Regional) for m in patched.values() for c in said_of(m, USE)[-1:]):
        raise TokenGateError(
            f"{asked} was asked of a model whose rows have their own adapters: call "
            "tokengate.use(model, name) first, with the one that is meant."
        )


def modified_by_rows(
    layer: Any, input: Tensor, out: Tensor, mask: Tensor | None, told: Told
) -> tuple[Tensor, Tensor]:
    """h and S of a layer's call, of each row's own adapter; S is False in the rows of none."""
    dim = 1 if layer._sequence_first and input.dim() == 3 else 0
    is_open = torch.zeros(out.shape[:-1], dtype=torch.bool, device=out.device)
    h = out
    for name, at in told.choice.of(input, dim, None if layer._sequence_first else mask):
        adapter = layer.adapter(name)
        if adapter is None:
            continue
        own_mask = mask
        if mask is not None:  # (B, T), also where the input is flattened
            flat = input.dim() == 2
            own_mask = mask.reshape(-1)[at].view(-1, mask.shape[1]) if flat else mask[at]
        own_inside = None if told.inside is None else told.inside[at]
        parts = (input.index_select(dim, at), out.index_select(dim, at), own_mask, own_inside)
        part, opened, _, scores = layer.modified(*parts, *adapter)
        if adapter[1] is not None:
            adapter[1].count(layer.samples_first(scores), counted(own_mask, own_inside))
        h = h.index_copy(dim, at, part)
        if opened is None:
            opened = torch.ones(part.shape[:-1], dtype=torch.bool, device=out.device)
        is_open = is_open.index_copy(dim, at, opened)
    return h, is_open


def modified_by_region(
    layer: Any, input: Tensor, out: Tensor, mask: Tensor | None, told: Told
) -> tuple[Tensor, Tensor]:
    """The same, of each region's own adapter; all are compared with the base's output."""
    parts: list[Part] = []
    masks = []
    for name, part in zip(told.choice.regions, told.parts, strict=True):
        adapter = layer.adapter(name)
        if adapter is None:
            continue
        if told.inside is not None:
            part = part * told.inside  # of truths, both
        masks.append(cast(Tensor, counted(mask, part)))
        real = layer.in_own_order(masks[-1], out)
        x = layer.inputs(adapter[0], input)
        parts.append((x, *adapter, layer.in_own_order(part, out), real))
    h, is_open, scores = in_regions(layer, out, layer.bias, parts)
    for (_, _, gate, *_), own, real in zip(parts, scores, masks, strict=True):
        if gate is not None:
            gate.count(layer.samples_first(own), real)
    return h, is_open


# Of one adapter the inputs of a layer as it reads them, its modification and gate; how much of
# M(x) its region lets through, (...); and which positions count, (...), or None.
Part = tuple[Any, Modification, Gate | None, Tensor, Tensor | None]


def in_regions(
    linear: Any, out: Tensor, bias: Tensor | None, parts: Iterable[Part]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """h and S of a layer's output, `(..., d)`, to which each part adds its own; and the scores of
    each part's gate, `(...)`, where they are counted."""
    is_open = torch.zeros(out.shape[:-1], dtype=torch.bool, device=out.device)
    h, w = out, without_bias(out, bias)
    all_scores = []
    for x, modification, gate, weights, real in parts:
        factors = modification.factors(x, w, linear)
        m = whole_of(modification, x, w) if factors is None else factors.product(w)
        change = Change(out, bias, m if factors is None else factors)
        weights = weights.to(change.dtype)
        scores = None
        if gate is not None:
            a, scores = decided(gate, change, x, real)
            weights = torch.where(weights != 0, weights * a, 0)
        added = Change(h, bias, m)
        added.learn = _learnt(change)
        h = added.add(weights)
        is_open = is_open | (weights.detach() != 0)
        all_scores.append(scores)
    return h, is_open, all_scores


def _learnt(change: Change) -> Learn | None:
    """What learns of a change, where M(x) is added whole: from z and dL/dz = up' dL/dm."""
    learn, factors = change.learn, change.m
    if learn is None or not isinstance(factors, Factors):
        return learn
    return lambda _, grad: learn(factors.z, grad @ factors.up)


def counted(mask: Tensor | None, inside: Tensor | None) -> Tensor | None:
    """Which positions count, `(B, T)`: those that are real and inside; None for all."""
    if inside is None:
        return mask
    if mask is None:
        kept = inside != 0
        return kept.flatten(1) if kept.dim() > 1 else kept.reshape(-1, 1)
    return (mask != 0) & (inside != 0).reshape(mask.shape)


def whole_of(modification: Modification, x: Tensor, w: Tensor) -> Tensor:
    """M(x) of a modification that gives no factors, checked, `(..., out_features)`."""
    m: Tensor = modification(x, w)
    # Addition would broadcast what is too small, to all positions alike.
    if m.shape != w.shape:
        raise TokenGateError(
            f"{type(modification).__name__} gave a modification of shape {tuple(m.shape)} for an "
            f"output of shape {tuple(w.shape)}: return M(x) in the shape of w."
        )
    return m
