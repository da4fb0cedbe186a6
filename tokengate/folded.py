"""Layers whose modification is in their weight, or was dropped, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.gate import TokenGate
from tokengate.gated_linear import Gated, attach, detach
from tokengate.modifications import Modification

# On the model that was folded: {name: Folded}.
_FOLDED = "_tokengate_folded"
# What a layer has on itself once its adapters have names.
_NAMED = ("_adapters", "_in_use")


@dataclass
class Folded:
    """One layer that is plain again, and what it was."""

    layer: Any
    modification: Modification
    gate: TokenGate | None
    other: Tensor | None
    """Of W0 and the merged weight the one that is not in place; None if nothing was merged."""
    named: dict[str, Any]
    """What the layer knows of its adapter's name; empty if that is the default."""
    resting: nn.Module | None
    """Its child for adapters that are out of use; None where they have no names."""
    merged: bool = False
    """Whether the merged one is in place."""

    def put(self, merged: bool) -> None:
        """The merged weight in place, or W0, in the same parameter; nothing is copied.

        A weight that was moved or cast since takes the other along.

        Raises:
            TokenGateError: the weight has no values, being on the meta device.
        """
        if self.other is not None and merged != self.merged:
            weight = self.layer.weight
            if weight.is_meta:
                raise TokenGateError(
                    f"a {type(self.layer).__name__} was offloaded after it was folded, so that W0 "
                    "cannot take its weight's place: take the offloading's hooks off first."
                )
            other = self.other.to(weight)
            self.other, weight.data, self.merged = weight.data, other, merged


def is_folded(module: nn.Module) -> bool:
    """Whether `module` is one that was given to `fold`."""
    return _FOLDED in module.__dict__


def folded(model: nn.Module) -> dict[str, Folded]:
    """The layers of `model` that are folded, by name."""
    found: dict[str, Folded] = {}
    for prefix, module in model.named_modules():
        for name, each in module.__dict__.get(_FOLDED, {}).items():
            found[f"{prefix}.{name}" if prefix else name] = each
    return found


def fold_layer(model: nn.Module, name: str, layer: Gated, merged: Tensor | None) -> None:
    """Make `layer` plain again, with the weight `merged`, or without its modification."""
    named = {key: layer.__dict__[key] for key in _NAMED if key in layer.__dict__}
    entry = Folded(
        layer, layer.modification, layer.gate, merged, named, layer._modules.get("adapters")
    )
    detach(layer)
    entry.put(merged=True)
    model.__dict__.setdefault(_FOLDED, {})[name] = entry


def unfold(model: nn.Module) -> None:
    """Patch every folded layer in `model` again as it was, on its weight W0."""
    for module in list(model.modules()):
        entries = module.__dict__.get(_FOLDED, {})
        for name in list(entries):
            _reattach(entries[name])
            del entries[name]  # only now: whoever is interrupted can call it again
        module.__dict__.pop(_FOLDED, None)


@contextlib.contextmanager
def unfolded(model: nn.Module) -> Iterator[None]:
    """Within this context the folded layers of `model` are patched as they were."""
    entries = folded(model).values()
    try:
        for each in entries:
            _reattach(each)
        yield
    finally:
        for each in entries:
            detach(each.layer)
            each.put(merged=True)


def _reattach(each: Folded) -> None:
    each.put(merged=False)
    device = each.layer.weight.device
    gate = None if each.gate is None else each.gate.to(device)
    attach(each.layer, each.modification.to(device), gate)
    if each.resting is not None:
        each.layer.__dict__ |= each.named
        each.layer.register_module("adapters", each.resting)
