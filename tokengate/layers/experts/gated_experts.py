"""One projection of all experts, patched: a modification and a tau for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from tokengate.errors import TokenGateError
from tokengate.gates.base import Gate
from tokengate.gates.deciding import Changed, Observer, changed, wanted
from tokengate.kernels.change import Change
from tokengate.kernels.gated_sum import without_bias
from tokengate.kernels.groups import Groups
from tokengate.kernels.norms import reshaped
from tokengate.kernels.recomputation import is_learnt_from
from tokengate.layers.calls import RECORD, contexts, said_of
from tokengate.layers.experts.products import Whose
from tokengate.layers.experts.routing import Routing
from tokengate.layers.gated_linear import Gated
from tokengate.layers.regions import Regional
from tokengate.layers.several import Part, Rows, Told, counted, in_regions, whole_of
from tokengate.linears.experts import StackedLinear
from tokengate.methods.base import Modification


class GatedExperts(Gated, StackedLinear):
    """h = W0_e x + S M_e(x) (eq. 2), with e the expert of each row, `(N, k) -> (N, d)`.

    Never constructed: `patch` gives a `StackedLinear` this class. Its modification and gate hold
    those of all its experts: A `(E, r, k)`, B `(E, d, r)`, tau `(E,)`. Rows of experts that are
    none of its own stay what they are.
    """

    _own_class = StackedLinear

    def be_of(
        self, experts: tuple[int, ...], modification: Modification, gate: Gate | None
    ) -> None:
        """From now on it is of these experts, with what its only adapter is for them."""
        self.experts = experts
        for part, module in (("modification", modification), ("gate", gate)):
            for adapter in (self._adapters or {}).values():
                setattr(adapter, part, module)
            self._modules[part] = None if module is None else module.train(self.training)

    def forward(  # type: ignore[override]
        self, input: Tensor, out: Tensor, bias: Tensor | None, whose: Whose, routing: Routing
    ) -> Tensor:
        """`out`, `(N, d)`, which is the owner's product of `input`, `(N, k)`, changed.

        Args:
            input: the rows.
            out: W0_e of each of them, with the `bias`, `(d,)`, if there is one.
            bias: None where it is added afterwards.
            whose: the experts of the rows.
            routing: the owner's call.
        """
        if not torch.compiler.is_compiling() and not self._reached:
            self._reached = True
        call: _Call | None = routing.calls.get(self.key)
        if call is None:  # told once for all products of the owner's call
            states = routing.positions(whose, len(self.held))
            call = routing.calls[self.key] = _Call(self, self._told_of(states), states.shape[:-1])
        if not call.adapters:
            return out
        rows = _Rows(input, out, bias)
        if call.needs_places:
            rows.places = routing.places(whose, input)
            rows.put(call)
        if whose.rows is not None:  # what is no expert's own is given to it as zeros
            given = (input != 0).any(-1)
            rows.real = given if rows.real is None else rows.real & given
        if whose.expert is not None:
            expert = int(whose.expert)
            return call.of_one(self.experts.index(expert), rows) if expert in self.experts else out
        if whose.ids is None and self.is_of_all:
            return call.of_all(_groups(whose, self.num_experts, input), rows)
        ids, order = self._numbers_of(whose, input).sort()
        rows = rows.at(order)
        ends = torch.searchsorted(
            ids, torch.arange(self.num_experts, device=ids.device), right=True
        )
        if not self.is_of_all:
            own = ids < self.num_experts
            rows.inside = own if rows.inside is None else rows.inside * own
        h = call.of_all(Groups(ends, len(ids), not self.is_of_all), rows)
        return torch.zeros_like(h).index_copy(0, order, h)

    def _numbers_of(self, whose: Whose, x: Tensor) -> Tensor:
        """Which of its experts each row is of, `(N,)`; as many as it has for those of others."""
        ids = _groups(whose, len(self.held), x).of_row if whose.ids is None else whose.ids
        if self.is_of_all:
            return ids
        numbers = dict(zip(self.experts, range(self.num_experts), strict=True))
        every = [numbers.get(expert, self.num_experts) for expert in range(len(self.held))]
        return torch.tensor(every, device=ids.device)[ids]


@dataclass(eq=False)
class _Rows:
    """Rows of a product, in the order of their experts.

    Attributes:
        x: `(N, k)`.
        out: `(N, d)`.
        bias: which `out` has, `(d,)`, or None.
        places: the position of each, `(N,)`, or None.
        real: whether it counts, `(N,)`; None for all.
        inside: what restrictions allow, `(N,)`, or None.
    """

    x: Tensor
    out: Tensor
    bias: Tensor | None
    places: Tensor | None = None
    real: Tensor | None = None
    inside: Tensor | None = None

    def put(self, call: _Call) -> None:
        """What is said of the positions, at the rows."""
        if self.places is None:
            if call.told.inside is not None or call.parts is not None:
                asked = "restrict" if call.parts is None else "use of several adapters"
                raise TokenGateError(
                    f"{asked} was asked of experts whose forward is not given the experts of each "
                    "position, (T, K), so that nobody knows which position a row is: name other "
                    "layers, {'pattern': mask}, or one adapter."
                )
            return
        if call.told.inside is not None:
            self.inside = call.told.inside.reshape(-1)[self.places]
        mask = counted(call.mask, call.told.inside)
        if mask is not None:
            self.real = (mask.reshape(-1) != 0).to(self.x.device)[self.places]

    def at(self, which: Any) -> _Rows:
        """Some of them, or all in another order."""
        rest = (self.places, self.real, self.inside)
        return _Rows(
            self.x[which], self.out[which], self.bias, *(t if t is None else t[which] for t in rest)
        )


class _Call:
    """A call of the owner, as far as one projection is concerned."""

    def __init__(self, layer: GatedExperts, told: Told, shape: torch.Size) -> None:
        self.layer, self.told, self.shape = layer, told, shape
        # Of several adapters, where each acts; None where there is one, everywhere.
        self.parts: list[Tensor] | None = None
        names = [told.choice] if isinstance(told.choice, str) else []
        if isinstance(told.choice, Regional):
            names = [name for name in told.choice.regions if layer.adapter(name) is not None]
            by_name = dict(zip(told.choice.regions, told.parts, strict=True))
            self.parts = [by_name[name] for name in names]
        elif isinstance(told.choice, Rows):
            raise TokenGateError(
                "experts were patched within tokengate.use of one adapter for each row, of which "
                "they know nothing: leave the context, and enter it anew."
            )
        found = map(layer.adapter, names)
        self.adapters = [adapter for adapter in found if adapter is not None]
        # A mask of other positions than these is of none.
        fits = told.mask is not None and told.mask.numel() == shape.numel()
        self.mask = told.mask if fits else None
        self.observers: list[Observer] = said_of(layer, RECORD) if contexts() else []
        gates = [gate for _, gate in self.adapters if gate is not None]
        # Whether one of them counts its scores.
        self.counts = is_learnt_from() and any(gate.counts_scores for gate in gates)
        of_positions = (self.parts, self.mask, told.inside)
        self.needs_places = bool(
            self.counts or self.observers or any(each is not None for each in of_positions)
        )
        # No cached_property: below Python 3.12 it takes a lock, which no compiler sees through.
        self._each: list[tuple[Any, list[tuple[Modification, Gate | None]]]] | None = None

    def each(self) -> list[tuple[Any, list[tuple[Modification, Gate | None]]]]:
        """Of each expert the layer, and the adapters' modifications and gates."""
        if self._each is None:
            layers = self.layer.each()
            adapters = []
            for modification, gate in self.adapters:
                gates = [None] * len(layers) if gate is None else cast(Any, gate).each()
                adapters.append(list(zip(cast(Any, modification).each(), gates, strict=True)))
            together = map(list, zip(*adapters, strict=True))
            self._each = list(zip(layers, together, strict=True))
        return self._each

    def of_one(self, expert: int, rows: _Rows) -> Tensor:
        """The changed rows of one expert."""
        linear, adapters = self.each()[expert]
        if self.parts is not None:
            parts = list(self._at_rows(rows, adapters))
            h, is_open, each = in_regions(linear, rows.out, rows.bias, parts)
            self._tell([expert], None, rows, Changed(h, is_open, None, None))
            for (_, _, gate, _, real), scores in zip(parts, each, strict=True):
                if gate is not None and self.counts:
                    own = Changed(h, None, None, scores)
                    of, at = self._at_positions(replace(rows, real=real), own)
                    gate.count(of.scores, at)
            return h
        ((modification, gate),) = adapters
        w = without_bias(rows.out, rows.bias) if modification.reads_w else rows.out
        factors = modification.factors(rows.x, w, linear)
        m = whole_of(modification, rows.x, w) if factors is None else factors
        change = Change(rows.out, rows.bias, m)
        found = changed(change, rows.x, rows.real, rows.inside, gate, *wanted(self.observers))
        self._tell([expert], None, rows, found)
        return found.h

    def _at_rows(
        self, rows: _Rows, adapters: list[tuple[Modification, Gate | None]]
    ) -> Iterator[Part]:
        """What each adapter adds to one expert's rows, and where."""
        assert self.parts is not None
        assert rows.places is not None
        for (modification, gate), part in zip(adapters, self.parts, strict=True):
            weights = part.reshape(-1)[rows.places]
            weights = weights if rows.inside is None else weights * rows.inside
            real = weights != 0
            real = real if rows.real is None else real & (rows.real != 0)
            yield rows.x, modification, gate, weights, real

    def of_all(self, groups: Groups, rows: _Rows) -> Tensor:
        """The changed rows of several experts."""
        if self.parts is not None:
            return self._one_by_one(groups, rows)
        ((modification, gate),) = self.adapters
        if not modification.stacks or not (gate is None or gate.stacks):
            return self._one_by_one(groups, rows)
        maps = modification.maps(cast(Any, self.layer), rows.out.dtype)
        assert maps is not None
        factors = maps.grouped(rows.x, modification.training, groups)
        change = Change(rows.out, rows.bias, factors)
        found = changed(change, rows.x, rows.real, rows.inside, gate, *wanted(self.observers))
        self._tell(range(self.layer.num_experts), groups, rows, found)
        return found.h

    def _one_by_one(self, groups: Groups, rows: _Rows) -> Tensor:
        parts, at = [], 0
        for expert, own in groups.slices():
            parts.append(self.of_one(expert, rows.at(own)))
            at = own.stop
        parts.append(rows.out[at:])
        return torch.cat(parts)

    def _tell(
        self, experts: Iterable[int], groups: Groups | None, rows: _Rows, found: Changed
    ) -> None:
        """Tell observers and the gate, expert by expert, of its positions."""
        if not (self.observers or self.counts):
            return
        for expert in experts:
            own, of = rows, found
            if groups is not None:
                of_expert = (groups.of_row == expert).nonzero().flatten()
                pick = partial(torch.index_select, dim=0, index=of_expert)
                own, of = rows.at(of_expert), _each(found, pick)
            of, real = self._at_positions(own, of)
            for observer in self.observers:
                observer.of(expert).hear(of.is_open, of.h, real, of.norms, scores=of.scores)
            if self.counts and self.parts is None:
                cast(Gate, self.adapters[0][1]).count(of.scores, real)

    def _at_positions(self, rows: _Rows, found: Changed) -> tuple[Changed, Tensor | None]:
        """The same by samples, (B, T), with something in the shape of h; and what is real."""
        if rows.places is None:
            return found, None if rows.real is None else rows.real.unsqueeze(-1)
        places, count = rows.places, self.shape.numel()
        shape = self.shape if self.mask is None else self.mask.shape
        shape = torch.Size((*shape, 1)) if len(shape) == 1 else shape

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(count).index_copy(0, places, values).view(shape)

        real = torch.ones_like(places, dtype=torch.bool) if rows.real is None else rows.real
        here = rows.out.new_empty((1,)).expand(*shape, 1)
        return _each(found, spread)._replace(h=here), spread(real)


def _each(found: Changed, of: Callable[[Tensor], Tensor]) -> Changed:
    """Of numbers of positions, some or in another order; h stays."""
    opened, norms, scores = found.is_open, found.norms, found.scores
    return Changed(
        found.h,
        None if opened is None else of(opened),
        None if norms is None else (reshaped(norms[0], of), reshaped(norms[1], of)),
        None if scores is None else of(scores),
    )


def _groups(whose: Whose, experts: int, x: Tensor) -> Groups:
    if whose.ends is not None:
        return Groups(whose.ends, len(x))
    assert whose.rows is not None
    return Groups(torch.arange(1, experts + 1, device=x.device) * whose.rows, len(x))
