"""A method's options, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tokengate.errors import TokenGateError
from tokengate.patterns import as_patterns, matches, nearest, show


def options_by_layer(
    options: Mapping[str, Any], names: Collection[str]
) -> dict[str, dict[str, Any]]:
    """The options of each layer of `names`; a dict as a value is resolved by pattern.

    Raises:
        TokenGateError: a layer matches no pattern, or a pattern decides for no layer.
    """
    by_layer: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, value in options.items():
        values = _by_pattern(option, value, names) if isinstance(value, Mapping) else None
        for name, chosen in by_layer.items():
            chosen[option] = value if values is None else values[name]
    return by_layer


def _by_pattern(option: str, table: Mapping[Any, Any], names: Collection[str]) -> dict[str, Any]:
    patterns = as_patterns(option, table)
    values: dict[str, Any] = {}
    idle = dict.fromkeys(patterns)
    for name in names:
        for pattern in patterns:
            if matches(pattern, name):
                values[name] = table[pattern]
                idle.pop(pattern, None)
                break
        else:
            raise TokenGateError(
                f"{option}= has no pattern for the layer {name!r}: add one, or '*' at the end for "
                "all others."
            )
    for pattern in idle:
        if any(matches(pattern, name) for name in names):
            raise TokenGateError(
                f"{option}= never uses {show(pattern)}, because earlier patterns match the same "
                "layers: put it before them."
            )
        raise TokenGateError(
            f"{option}= names {show(pattern)}, which matches no targeted layer; "
            f"{nearest(pattern, names)}."
        )
    return values
