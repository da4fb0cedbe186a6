"""Where a report comes from: the model and what modifies it, versions, and the time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any

from torch import nn

from tokengate.gates.base import Gate
from tokengate.gates.registry import GATES
from tokengate.linears.class_swap import own_class
from tokengate.methods.base import Modification
from tokengate.methods.registry import METHODS
from tokengate.names import inside

# Whose versions change what a model computes; of those only that are in use.
_LIBRARIES = (
    "tokengate", "torch", "transformers", "timm", "open_clip", "diffusers", "bitsandbytes",
    "torchao",
)  # fmt: skip


def name_of_model(model: nn.Module) -> str:
    """Its class, and the name that a hub has for it; of a folder of this machine the last part."""
    model = inside(model)
    found = getattr(getattr(model, "config", None), "_name_or_path", None)
    name = found if isinstance(found, str) else ""
    if PurePath(name).is_absolute() or name.startswith((".", "~")):
        name = PurePath(name).name
    return f"{own_class(model).__name__} {name}".strip()


def version_of(library: str) -> str:
    """As an imported library says it: only what was installed has metadata that do."""
    return str(getattr(sys.modules[library], "__version__", "?"))


def provenance(
    model: str, parts: Mapping[str, tuple[Modification | None, Gate | None]]
) -> dict[str, str]:
    """What a report says of itself, by what it is, in the order to be read.

    Args:
        model: its name.
        parts: what every patched layer has. Where layers differ, all values are named.
    """
    modifications = [m for m, _ in parts.values() if m is not None]
    gates = [gate for _, gate in parts.values()]
    found = {
        "model": model,
        "method": _all(METHODS.name_of(type(m)) or type(m).__name__ for m in modifications),
        "gate": _all(
            "none" if g is None else GATES.name_of(type(g)) or type(g).__name__ for g in gates
        ),
        "rank": _all(getattr(m, "rank", None) for m in modifications),
        "scale": _all(getattr(m, "scale", None) for m in modifications),
        "lambda": _all(getattr(gate, "penalty", None) for gate in gates),
        "versions": ", ".join(
            f"{name} {version_of(name)}" for name in _LIBRARIES if name in sys.modules
        ),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {what: said for what, said in found.items() if said}


def _all(values: Iterable[Any]) -> str:
    """The different ones, in order; those that are None are not said."""
    said = (
        f"{value:g}" if isinstance(value, float) else str(value)
        for value in values
        if value is not None
    )
    return ", ".join(dict.fromkeys(said))
