"""The slices of fused layers among a model's modules, so that patterns can mean them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.layers.gated_linear import Gated
from tokengate.layers.sliced_linear import Sliced, slices_of
from tokengate.linears.experts import StackedLinear
from tokengate.linears.fused import known_slices
from tokengate.linears.linear_like import LinearSlice, features_of, is_linear
from tokengate.linears.slices import Slices
from tokengate.names import joined, named_children, named_modules
from tokengate.patching.stack_targets import stacked_projections
from tokengate.patterns import Pattern, as_patterns, is_one_word, matches, nearest, show

# What is a part of something that can be a target as a whole.
PARTS = (LinearSlice, StackedLinear)


def with_slices(
    model: nn.Module, given: Any, given_stacks: Any = None
) -> list[tuple[str, nn.Module]]:
    """`named_modules` under all names, each fused layer followed by its slices.

    And each module of experts by the projections that it holds in 3-D parameters.

    Args:
        model: the model.
        given: the user's own `Slices` by pattern, which come before the known ones; or None.
        given_stacks: the axes of the user's own stacked parameters, by pattern; or None.

    Raises:
        TokenGateError: what is given is no `Slices`, or fits no layer.
    """
    named = list(named_modules(model, remove_duplicate=False))
    divided = {
        layer: slices
        for owner in model.modules()
        for attribute, layer in named_children(owner)
        if is_linear(layer) and (slices := known_slices(owner, attribute))
    } | _given_slices(model, given)
    # What is patched in part stays divided as it is, whatever is known.
    divided |= {layer: slices_of(layer) for _, layer in named if isinstance(layer, Sliced)}
    parts: dict[nn.Module, dict[str, nn.Module]] = {}
    for layer, slices in divided.items():
        # Those that are patched are children of the layer already.
        patched = dict(layer.named_children()) if isinstance(layer, Sliced) else {}
        new = {n: LinearSlice(layer, slices, n) for n in slices.sizes if n not in patched}  # type: ignore[arg-type]
        parts[layer] = new  # type: ignore[assignment]
    parts |= stacked_projections(model, given_stacks, given)
    return [
        entry
        for name, module in named
        for entry in (
            (name, module),
            *((joined(name, own), p) for own, p in parts.get(module, {}).items()),
        )
    ]


def _given_slices(model: nn.Module, given: Any) -> dict[nn.Module, Slices]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TokenGateError(
            f"slices= was given {brief(given)}: pass a dict from names of layers to how they are "
            'divided, e.g. {"qkv": tokengate.Slices(q=64, k=64, v=64)}.'
        )
    found: dict[nn.Module, Slices] = {}
    linear = [(n, m) for n, m in named_modules(model, remove_duplicate=False) if is_linear(m)]
    stacks = [joined(n, own) for n, m in named_modules(model) for own in m._parameters]
    for pattern in as_patterns("slices", [*given]):
        slices = given[pattern]
        if not isinstance(slices, Slices):
            raise TokenGateError(
                f"slices= has {brief(slices)} for {show(pattern)}: pass tokengate.Slices(...)."
            )
        hits = [(name, module) for name, module in linear if matches(pattern, name)]
        if not hits and any(matches(pattern, name) for name in stacks):
            continue  # which `stacked_projections` looks at
        if not hits:
            raise TokenGateError(
                f"slices= names {show(pattern)}, which matches no linear layer of this "
                f"{type(model).__name__}; {nearest(pattern, (n for n, _ in linear))}."
            )
        for name, layer in hits:
            _check_fits(name, layer, slices)
            found.setdefault(layer, slices)
    return found


def _check_fits(name: str, layer: Any, slices: Slices) -> None:
    out_features = features_of(layer)[1]
    if slices.out_features != out_features:
        raise TokenGateError(
            f"slices= divides {name!r} by {slices}, which is {slices.out_features} outputs, but it "
            f"has {out_features}: correct the sizes."
        )
    if isinstance(layer, Sliced) and slices_of(layer) != slices:
        raise TokenGateError(
            f"slices= divides {name!r} by {slices}, but it is patched in part by "
            f"{slices_of(layer)} already: call tokengate.unpatch(model) first."
        )
    taken = [n for n in slices.sizes if not isinstance(layer, Sliced) and hasattr(layer, n)]
    if taken:
        raise TokenGateError(
            f"slices= calls a part of {name!r} {taken[0]!r}, which a {type(layer).__name__} has "
            "already: choose another name."
        )


def slices_of_part(layer: Any) -> Slices | None:
    """How what a layer is a slice of is divided; None of one that is no slice."""
    if isinstance(layer, StackedLinear):
        return None if layer.part is None else layer.stack.slices
    return layer.slices if isinstance(layer, LinearSlice) else None


def matched(pattern: Pattern, named: Iterable[tuple[str, nn.Module]]) -> set[nn.Module]:
    """What `pattern` means among the modules and slices that `with_slices` names.

    "gate" is a layer of this name, "gate_up_proj.gate" a slice.
    """
    one_word = is_one_word(pattern)
    return without_parts_of_wholes(
        {m for name, m in named if matches(pattern, name) and not (one_word and _is_new_slice(m))}
    )


def _is_new_slice(module: nn.Module) -> bool:
    """Whether `module` is a slice that is not patched."""
    is_part = isinstance(module, StackedLinear) and module.part is not None
    return (is_part or isinstance(module, LinearSlice)) and not isinstance(module, Gated)


def without_parts_of_wholes(hits: set[nn.Module]) -> set[nn.Module]:
    """What one pattern matches; a slice only where it does not match the whole layer, too."""
    return {m for m in hits if not (isinstance(m, PARTS) and m.fused in hits)}


def check_slices(
    chosen: Collection[nn.Module],
    excluded: Collection[nn.Module],
    first: Mapping[nn.Module, str],
    given: Any,
) -> None:
    """An error where a layer and a slice of it are asked for, or what is `given` is not used."""
    for module, name in first.items():
        if isinstance(module, PARTS) and module.fused in chosen:
            whole = first[module.fused]  # type: ignore[index]
            if module in chosen:
                raise TokenGateError(
                    f"targets names {whole!r} and its slice {name!r}: name the layer, or slices "
                    "of it."
                )
            if module in excluded:
                raise TokenGateError(
                    f"exclude matches {name!r}, a slice of {whole!r}, which is a target as a whole"
                    ": name the slices that are to be patched as targets, or let exclude= match "
                    f"all of {whole!r} or nothing of it."
                )
    divided = {module.fused for module in chosen if isinstance(module, PARTS)}
    for pattern in as_patterns("slices", [*(given or ())]):
        layers = [
            m
            for m, name in first.items()
            if matches(pattern, name) and (is_linear(m) or isinstance(m, StackedLinear))
        ]
        if divided.isdisjoint(layers):
            example = f"{first[layers[0]]}.{next(iter(given[pattern].sizes))}".removeprefix(".")
            raise TokenGateError(
                f"slices= divides {show(pattern)}, but no slice of it is a target: name one, e.g. "
                f"{example!r}, or drop slices=."
            )


def unknown_slice(pattern: Any, names: Collection[str]) -> str:
    """What to add where `pattern`, which matches nothing, may have meant a slice."""
    if not isinstance(pattern, str) or "." not in pattern:
        return ""
    layer, _, own = pattern.rpartition(".")
    if not own.isidentifier() or not any(matches(layer, name) for name in names):
        return ""
    return (
        f"; how {layer!r} is divided is not known here, so if {own!r} is a part of it, pass "
        f"slices={{{layer!r}: tokengate.Slices({own}=...)}}"
    )
