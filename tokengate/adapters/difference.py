"""What differs between two saved adapters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokengate.adapters.folder import SavedAdapter
from tokengate.adapters.inspection import describe_layer, tau_range
from tokengate.files.text_table import lines, text_table

# Of a layer's description, what is no option and compared on its own, or follows from the rest.
_NO_OPTION = {"options", "parameters", "tau"}


def difference(a: SavedAdapter, b: SavedAdapter) -> dict[str, Any]:
    """Layers of one alone, options that differ, and how far values are apart; ready for JSON.

    `distance` is ||b - a|| / ||a|| over all parameters of a layer's modification, or of what was
    trained beside the layers: 0 where they are equal, None where shapes differ or a is zero and b
    is not. The largest come first, those without a number before them.
    """
    in_a, in_b = list(a.config.layers), list(b.config.layers)
    both = [name for name in in_a if name in b.config.layers]
    options, common = {}, {}
    for name in both:
        one, other = describe_layer(a, name), describe_layer(b, name)
        if changed := _changed(one, other):
            options[name] = changed
        parts = [saved.under(f"{name}.modification.") for saved in (a, b)]
        common[name] = {"distance": _distance(*parts), "tau": [one["tau"], other["tau"]]}
    beside = {
        name: {"distance": _distance({name: a.tensors[name]}, {name: b.tensors[name]})}
        for name in a.config.train
        if name in b.config.train
    }
    return {
        "folders": [str(a.folder), str(b.folder)],
        "only_in_a": [n for n in [*in_a, *a.config.train] if n not in {*in_b, *b.config.train}],
        "only_in_b": [n for n in [*in_b, *b.config.train] if n not in {*in_a, *a.config.train}],
        "options": options,
        "layers": dict(sorted(common.items(), key=_largest_first)),
        "trained_beside": dict(sorted(beside.items(), key=_largest_first)),
    }


def _changed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    flat = [
        {**each["options"], **{k: v for k, v in each.items() if k not in _NO_OPTION}}
        for each in (one, other)
    ]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    pairs = {key: [each.get(key) for each in flat] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float | None:
    if {k: t.shape for k, t in a.items()} != {k: t.shape for k, t in b.items()}:
        return None
    apart = math.hypot(*(torch.dist(t.double(), b[k].double()).item() for k, t in a.items()))
    length = math.hypot(*(t.double().norm().item() for t in a.values()))
    if apart == 0:
        return 0.0
    return apart / length if length else None


def _largest_first(item: tuple[str, dict[str, Any]]) -> float:
    distance: float | None = item[1]["distance"]
    return -math.inf if distance is None else -distance


def difference_text(found: dict[str, Any]) -> str:
    """For people to read; of what is equal, only how much there is."""
    a, b = found["folders"]
    said = [f"a: {a}", f"b: {b}"]
    for key, letter in (("only_in_a", "a"), ("only_in_b", "b")):
        said += [f"only in {letter}: {name}" for name in found[key]]
    for text, names in _same_changes(found["options"]).items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        said.append(f"options of {names[0]}{more}: {text}")
    rows = [
        [name, each["distance"], *map(_shown, each.get("tau", (None, None)))]
        for part in ("layers", "trained_beside")
        for name, each in found[part].items()
        if each["distance"] != 0 or each.get("tau", [0])[0] != each.get("tau", [0])[-1]
    ]
    equal = len(found["layers"]) + len(found["trained_beside"]) - len(rows)
    equals = f"{equal} with equal values"
    if rows:
        table = text_table(["values", "|b - a| / |a|", "tau in a", "tau in b"], rows)
        equals = f"\n{table}\n\n{equals}"
    return f"{lines(said)}\n{equals}"


def _shown(tau: Any) -> Any:
    return tau_range(tau) if isinstance(tau, list) else tau


def _same_changes(options: dict[str, dict[str, list[Any]]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, changed in options.items():
        text = ", ".join(f"{key} {one} in a, {other} in b" for key, (one, other) in changed.items())
        found.setdefault(text, []).append(name)
    return found
