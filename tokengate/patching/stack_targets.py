"""What experts hold in 3-D parameters among a model's modules, so that patterns can mean it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.layers.experts.owner import patched_projections
from tokengate.linears.experts import AXES, Stack, StackedLinear, known_stacks
from tokengate.linears.slices import Slices
from tokengate.names import joined, named_modules
from tokengate.patterns import as_patterns, matches, nearest, show


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
    for pattern in as_patterns("experts", axes):
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
