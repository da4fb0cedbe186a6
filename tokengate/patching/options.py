"""A method's options, layer by layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from tokengate.errors import RankWarning, TokenGateError, brief, listed
from tokengate.linears.linear_like import features_of
from tokengate.patterns import Pattern, as_patterns, matches, nearest, show


def options_by_layer(
    options: Mapping[str, Any], names: Collection[str], which: str = "targeted"
) -> dict[str, dict[str, Any]]:
    """The options of each layer of `names`; a dict as a value is resolved by pattern.

    Errors say `which` layers they are.

    Raises:
        TokenGateError: a layer matches no pattern, or a pattern decides for no layer.
    """
    tables = {
        option: _by_pattern(option, value, names, which)
        for option, value in options.items()
        if isinstance(value, Mapping)
    }
    return {
        name: {**options, **{option: table[name] for option, table in tables.items()}}
        for name in names
    }


def warn_of_rank(options: Mapping[str, Mapping[str, Any]], layers: Mapping[str, Any]) -> None:
    """Warn, once for all of them, of layers given a rank that no matrix of theirs can have."""
    found = []
    for name, layer in layers.items():
        sizes, rank = features_of(layer), options[name].get("rank", 0)
        if rank > max(sizes):
            found.append(f"{name!r} ({sizes[0]} -> {sizes[1]}, rank {rank})")
    if found:
        warnings.warn(
            f"the rank is above both features of {listed(found)}, where a lower one gives every "
            'matrix there is: pass one, e.g. as a dict, rank={"*.small": 4, "*": 16}.',
            RankWarning,
            stacklevel=4,
        )


def _by_pattern(
    option: str, table: Mapping[Any, Any], names: Collection[str], which: str
) -> dict[str, Any]:
    for key in table:
        if not isinstance(key, (str, re.Pattern)):
            raise TokenGateError(
                f"{option}= has the key {brief(key)}, which is no pattern: use names, globs or "
                "compiled regular expressions."
            )
    patterns = as_patterns(option, [*table])
    values: dict[str, Any] = {}
    used: set[Pattern] = set()
    for name in names:
        pattern = next((p for p in patterns if matches(p, name)), None)
        if pattern is None:
            # What was meant for it may be one that matches nothing.
            stray = [p for p in patterns if not any(matches(p, each) for each in names)]
            instead = f", or correct {show(stray[0])}; {nearest(stray[0], names)}" if stray else ""
            raise TokenGateError(
                f"{option}= has no pattern for the layer {name!r}: add one, or '*' at the end for "
                f"all others{instead}."
            )
        values[name] = table[pattern]
        used.add(pattern)
    for pattern in patterns:
        if pattern in used or pattern == patterns[-1] == "*":  # "all others" may be none
            continue
        if any(matches(pattern, name) for name in names):
            raise TokenGateError(
                f"{option}= never uses {show(pattern)}, because earlier patterns match the same "
                "layers: put it before them."
            )
        raise TokenGateError(
            f"{option}= names {show(pattern)}, which matches no {which} layer: correct it or take "
            f"it out; {nearest(pattern, names)}."
        )
    return values
