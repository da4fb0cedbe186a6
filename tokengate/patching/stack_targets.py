"""What experts hold in 3-D parameters among a model's modules, so that patterns can mean it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.layers.experts.owner import patched_projections
from tokengate.linears.experts import AXES, Stack, StackedLinear, known_stacks
from tokengate.linears.slices import Slices
from tokengate.names import joined, named_modules
from tokengate.patterns import Pattern, as_patterns, is_literal, matches, nearest, show


def stacked_projections(
    model: nn.Module, axes: Any, slices: Any
) -> dict[nn.Module, dict[str, nn.Module]]:
    """Of each module that holds stacks, what is not patched of them: projections and their parts.

    Args:
        model: the model.
        axes: those of the user's own stacks, by pattern over the names of parameters; or None.
        slices: the user's own `Slices`, by pattern; or None.

    Raises:
        TokenGateError: what is given are no axes, or fits no parameter.
    """
    stacks: dict[nn.Module, dict[str, Stack]] = {}
    for module in model.modules():
        if known := known_stacks(module):
            stacks[module] = known
    for module, parameter, given in _given(model, axes):
        stacks.setdefault(module, {})[parameter] = Stack(given)
    names = {module: name for name, module in named_modules(model)}
    found: dict[nn.Module, dict[str, nn.Module]] = {}
    for owner, own in stacks.items():
        patched = {(p.parameter, p.part) for p in patched_projections(owner)}
        for parameter, stack in own.items():
            full = joined(names.get(owner, ""), parameter)
            stack = Stack(stack.axes, _own_slices(full, slices) or stack.slices)
            whole = StackedLinear(owner, parameter, stack)
            if stack.slices is not None and stack.slices.out_features != whole.out_features:
                raise TokenGateError(
                    f"slices= divides {full!r} by {stack.slices}, which is "
                    f"{stack.slices.out_features} outputs, but it has {whole.out_features}: "
                    "correct the sizes."
                )
            parts = {
                joined(parameter, part): StackedLinear(owner, parameter, stack, part, whole)
                for part in (stack.slices.sizes if stack.slices else ())
                if (parameter, part) not in patched
            }
            if (parameter, None) not in patched:
                found.setdefault(owner, {})[parameter] = whole
            found.setdefault(owner, {}).update(parts)
    return found


class Single(StackedLinear):
    """One expert's part of a projection, as a target, which then is patched in part.

    Args:
        all_of: the projection.
        expert: its number.
    """

    all_of: StackedLinear

    def __init__(self, all_of: StackedLinear, expert: int) -> None:
        own = (all_of.owner, all_of.parameter, all_of.stack, all_of.part, all_of.fused)
        super().__init__(*own, [expert])
        object.__setattr__(self, "all_of", all_of)

    @property
    def place(self) -> tuple[StackedLinear | None, int]:
        """The projection, and which of its experts."""
        return self.all_of, self.experts[0]

    @property
    def place_around(self) -> tuple[StackedLinear | None, int]:
        """Of a slice, the same of what it is a slice of."""
        return self.fused, self.experts[0]


class Singles:
    """The experts that patterns mean one by one, by the names that reports have for them.

    Args:
        stacks: the model's projections of experts, by name.
        first: where a name is kept for each expert that is meant.
    """

    def __init__(
        self, stacks: Sequence[tuple[str, StackedLinear]], first: dict[nn.Module, str]
    ) -> None:
        self._stacks, self._first = stacks, first
        self._made: dict[str, Single] = {}
        self._by_key: dict[str, list[tuple[str, StackedLinear]]] = {}
        for name, stack in stacks:
            self._by_key.setdefault(stack.key, []).append((name, stack))

    def matched(self, pattern: Pattern, excludes: bool) -> set[Single]:
        """Those whose names it matches; where it `excludes`, "experts.3" is all of that expert."""
        hits = set()
        for stack, expert, name in self._near(pattern):
            owner = name.removesuffix(f".{stack.key}")
            if matches(pattern, name) or (excludes and matches(pattern, owner)):
                single = self._made.setdefault(name, Single(stack, expert))
                self._first.setdefault(single, name)
                hits.add(single)
        places = {single.place for single in hits}
        return {single for single in hits if single.place_around not in places}

    def _near(self, pattern: Any) -> Iterator[tuple[StackedLinear, int, str]]:
        """Projections, numbers and names of experts, all that it can match among them."""
        if not is_literal(pattern):
            for name, stack in self._stacks:
                for expert in range(len(stack.held)):
                    yield stack, expert, stack.name_of_expert(name, expert)
            return
        # Names come by the thousand: of each only where its number fits.
        parts = pattern.split(".")
        for at in (at for at, part in enumerate(parts) if part.isdecimal()):
            key, expert = ".".join(parts[at + 1 :]), int(parts[at])
            for name, stack in self._by_key.get(key, ()) if key else self._stacks:
                if expert < len(stack.held):
                    yield stack, expert, stack.name_of_expert(name, expert)

    def settled(self, chosen: set[nn.Module], excluded: set[nn.Module]) -> set[nn.Module]:
        """`chosen`, with projections of those experts that are meant in place of the experts.

        Raises:
            TokenGateError: of a projection, all experts are excluded.
        """
        meant: dict[StackedLinear, set[int]] = {}
        for module in chosen:
            if isinstance(module, Single):
                meant.setdefault(module.all_of, set()).update(module.experts)
        wholes = [m for m in chosen if isinstance(m, StackedLinear) and not isinstance(m, Single)]
        meant |= {stack: set(range(len(stack.held))) for stack in wholes}
        left_out = {single.place for single in excluded if isinstance(single, Single)}
        for stack, experts in meant.items():
            own = {e for e in experts if left_out.isdisjoint([(stack, e), (stack.fused, e)])}
            if not own:
                raise TokenGateError(
                    f"targets names {self._first[stack]!r}, all of whose experts exclude= leaves "
                    "out: drop one of the two."
                )
            stack.experts = tuple(sorted(own))
        return {m for m in chosen if not isinstance(m, Single)} | meant.keys()


def _own_slices(name: str, slices: Any) -> Slices | None:
    given = slices.items() if isinstance(slices, Mapping) else ()
    return next((each for pattern, each in given if matches(pattern, name)), None)


def _given(model: nn.Module, axes: Any) -> list[tuple[nn.Module, str, str]]:
    if axes is None:
        return []
    if not isinstance(axes, Mapping):
        raise TokenGateError(
            f"experts= was given {brief(axes)}: pass a dict from names of 3-D parameters to their "
            'axes, e.g. {"experts.w1": "eoi"} for (experts, outputs, inputs).'
        )
    parameters = [
        (joined(name, own), module, own)
        for name, module in named_modules(model)
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3
    ]
    found = []
    for pattern in as_patterns("experts", [*axes]):
        if axes[pattern] not in AXES:
            raise TokenGateError(
                f"experts= has {brief(axes[pattern])} for {show(pattern)}: pass "
                f"{' or '.join(map(repr, AXES))}, e for experts, o for outputs, i for inputs."
            )
        hits = [(m, own, axes[pattern]) for name, m, own in parameters if matches(pattern, name)]
        if not hits:
            raise TokenGateError(
                f"experts= names {show(pattern)}, which matches no 3-D parameter of this "
                f"{type(model).__name__}; {nearest(pattern, [n for n, *_ in parameters])}."
            )
        found += hits
    return found
