"""What is in a saved adapter, without its base model."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokengate.adapters.card import CARD
from tokengate.adapters.folder import WEIGHTS, SavedAdapter, config_path
from tokengate.errors import TokenGateError
from tokengate.files.text_table import lines, size, text_table
from tokengate.gates.registry import with_defaults
from tokengate.methods.registry import METHODS


def describe(saved: SavedAdapter) -> dict[str, Any]:
    """Methods, ranks, taus and sizes, ready for JSON."""
    layers = {name: describe_layer(saved, name) for name in saved.config.layers}
    taus = _taus(layers.values())
    files = [saved.folder / WEIGHTS, config_path(saved.folder), saved.folder / CARD]
    return {
        "folder": str(saved.folder),
        "saved_by": f"tokengate {saved.config.tokengate_version}",
        "base_class": saved.config.base_class or None,
        "base_id": saved.config.base_id or None,
        "base_revision": saved.config.base_revision or None,
        "asked": saved.config.targets,
        "methods": dict(Counter(layer["method"] for layer in layers.values())),
        "parameters": sum(tensor.numel() for tensor in saved.tensors.values()),
        "bytes": {p.name: p.stat().st_size for p in files if p.exists()},
        "trained_beside": {n: list(saved.tensors[n].shape) for n in saved.config.train},
        "gated_layers": sum(layer["tau"] is not None for layer in layers.values()),
        "tau": _distribution(taus),
        "layers": layers,
    }


def describe_layer(saved: SavedAdapter, name: str) -> dict[str, Any]:
    """One layer; tau is None without a gate, and of experts a list."""
    layer = saved.config.layers[name]
    tau = saved.tensors.get(f"{name}.gate.tau")
    return {
        "method": layer.method,
        **sizes(layer.in_features, layer.out_features),
        "options": all_options(layer.method, layer.options),
        "parameters": sum(t.numel() for t in saved.under(f"{name}.modification.").values()),
        "tau": None if tau is None else tau.item() if tau.numel() == 1 else tau.tolist(),
        "gate": layer.gate,
        "penalty": layer.penalty,
        "s": layer.s,
        "slices": layer.slices,
        "experts": layer.experts,
    }


def sizes(in_features: int, out_features: int) -> dict[str, int]:
    """Of a layer, under the names that all descriptions use."""
    return {"in_features": in_features, "out_features": out_features}


def all_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """With the defaults, where the method is known here."""
    try:
        return with_defaults(METHODS.find(method), options)
    except TokenGateError:
        return options


def _distribution(taus: list[float]) -> dict[str, float] | None:
    if not taus:
        return None
    quartiles = statistics.quantiles(taus, n=4, method="inclusive") if len(taus) > 1 else taus * 3
    return {
        "min": min(taus),
        **dict(zip(("quartile_1", "median", "quartile_3"), quartiles, strict=True)),
        "max": max(taus),
        "share_above_0": sum(tau > 0 for tau in taus) / len(taus),
    }


def layer_table(layers: dict[str, dict[str, Any]]) -> str:
    """Layers of one projection and kind in one line, with the range of their taus, if any."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for name, layer in layers.items():
        kind = (
            _projection(name),
            layer["method"],
            layer["options"].get("rank"),
            f"{layer['in_features']} -> {layer['out_features']}",
        )
        groups.setdefault(kind, []).append(layer)
    head = ["projection", "method", "rank", "features", "layers", "parameters", "tau"]
    rows = [
        [*kind, len(each), sum(layer["parameters"] for layer in each), tau_range(_taus(each))]
        for kind, each in groups.items()
    ]
    if all(row[-1] is None for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return text_table(head, rows)


def _projection(name: str) -> str:
    """The end of a name behind its last number."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), default=-1)
    return ".".join(parts[last + 1 :])


def _taus(layers: Iterable[dict[str, Any]]) -> list[float]:
    own = (layer["tau"] for layer in layers if layer["tau"] is not None)
    return [tau for each in own for tau in (each if isinstance(each, list) else [each])]


def tau_range(taus: list[float]) -> str | None:
    """From the least to the largest; None of none."""
    if not taus:
        return None
    low, high = f"{min(taus):.4g}", f"{max(taus):.4g}"
    return low if low == high else f"{low} to {high}"


def description_text(description: dict[str, Any]) -> str:
    """For people to read."""
    methods = ", ".join(f"{n} layers of {m}" for m, n in description["methods"].items())
    base = (description[f"base_{part}"] for part in ("class", "id", "revision"))
    files = ", ".join(f"{name} {size(n)}" for name, n in description["bytes"].items())
    said = [
        f"{description['folder']}: saved by {description['saved_by']}",
        f"base: {', '.join(filter(None, base)) or 'not named'}",
        f"{methods}, {description['gated_layers']} gated; {description['parameters']:,} parameters",
        files,
    ]
    for call in description["asked"]:
        asked = ", ".join(f"{key}={value!r}" for key, value in call.items() if value)
        said.append(f"asked: {asked}")
    said += option_lines(description["layers"])
    if description["trained_beside"]:
        beside = (f"{name} {shape}" for name, shape in description["trained_beside"].items())
        said.append(f"trained beside: {', '.join(beside)}")
    if tau := description["tau"]:
        spread = ", ".join(f"{k} {v:.4g}" for k, v in tau.items() if k != "share_above_0")
        said.append(f"tau: {spread}; above 0 in {100 * tau['share_above_0']:.0f} % of the gates")
    return f"{lines(said)}\n\n{layer_table(description['layers'])}"


def option_lines(layers: dict[str, dict[str, Any]]) -> list[str]:
    """Each combination of options once, without those that are not set."""
    given = (
        {key: value for key, value in layer["options"].items() if value not in (None, False)}
        for layer in layers.values()
    )
    shown = (", ".join(f"{key}={value}" for key, value in each.items()) for each in given)
    return [f"options: {text}" for text in dict.fromkeys(shown)]
