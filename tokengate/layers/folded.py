"""Layers whose modification is in their weight, or was dropped, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tokengate.gates.base import Gate
from tokengate.layers.changing import all_or_nothing
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import all_layers, forget_plain, own_by_id, rest, rise
from tokengate.layers.sliced_linear import put_on, take_off
from tokengate.linears.linear_like import holder
from tokengate.linears.merged_weight import MergedWeight, merged_weight
from tokengate.methods.base import Modification
from tokengate.names import inside, joined, named_modules

# On the model that was folded: {name: Folded}.
_FOLDED = "_tokengate_folded"
# What a layer has on itself once its adapters have names.
_NAMED = ("_adapters", "_in_use")
# On a parameter that its model has no more, and an optimiser may have.
_TAKEN_OUT = "_tokengate_taken_out"


@dataclass
class Folded:
    """One layer that is plain again, and what it was; of experts some may stay gated."""

    layer: Any
    modification: Modification
    gate: Gate | None
    weight: MergedWeight | None
    """None if nothing was merged."""
    named: dict[str, Any]
    """What the layer knows of its adapter's name; empty if that is the default."""
    resting: nn.Module | None
    """Its child for adapters that are out of use; None where they have no names."""

    def all_parts(self) -> list[nn.Module | None]:
        """The modules of all of its adapters."""
        return [self.modification, self.gate, self.resting]

    @property
    def merged(self) -> bool:
        """Whether the merged weight is in place."""
        return self.weight is not None and self.weight.in_place

    @property
    def is_plain(self) -> bool:
        """Whether the layer is no gated one meanwhile."""
        return True

    def put(self, merged: bool) -> None:
        """The merged weight in place, or W0; see `MergedWeight.put`."""
        if self.weight is not None:
            self.weight.put(merged)

    def take_off(self) -> None:
        """Make the layer plain."""
        take_off(self.layer)

    def put_on(self) -> None:
        """Patch it again as it was, on W0."""
        put_on(self.layer, self.modification, self.gate)
        if self.resting is not None:
            self.layer.__dict__ |= self.named
            self.layer.register_module("adapters", self.resting)

    def to_save(self) -> Folded | None:
        """What a saved adapter has of it: what is merged, without a gate; None if nothing is."""
        return None if self.weight is None else replace(self, gate=None)


def base_layer(layer: Gated | Folded) -> Any:
    """The linear layer itself, patched or plain again."""
    return layer.layer if isinstance(layer, Folded) else layer


def is_folded(module: nn.Module) -> bool:
    """Whether `module` is one that was given to `fold`."""
    return _FOLDED in module.__dict__


def folded(model: nn.Module) -> dict[str, Folded]:
    """The layers of `model` that are folded, by name."""
    found: dict[str, Folded] = {}
    for prefix, module in named_modules(model):
        for name, each in module.__dict__.get(_FOLDED, {}).items():
            found[joined(prefix, name)] = each
    return found


@contextlib.contextmanager
def unchanged_if_interrupted(
    model: nn.Module, entries: Collection[Folded] | None = None
) -> Iterator[None]:
    """`all_or_nothing` for a model with layers that are folded, or are to be: the `entries`."""
    entries = folded(model).values() if entries is None else entries
    before = [(each, each.merged) for each in entries]

    def put_back() -> None:
        for each, merged in before:
            each.put(merged)

    # A slice is no module of the model while it is folded.
    modules = [*model.modules(), *(each.layer for each in entries)]
    with all_or_nothing(modules, undo=put_back):
        yield


def as_folded(layer: Gated, merged: Tensor | None) -> Folded:
    """What `layer` is to be: plain, with the weight `merged`, or without its modification."""
    weight = None if merged is None else merged_weight(layer, merged)  # type: ignore[arg-type]
    return Folded(*what_it_is(layer), weight, *what_it_is_named(layer))


def what_it_is(layer: Gated) -> tuple[Gated, Modification, Gate | None]:
    """A layer and its parts, as `Folded` begins."""
    return layer, layer.modification, layer.gate


def what_it_is_named(layer: Gated) -> tuple[dict[str, Any], nn.Module | None]:
    """What it knows of its adapter's name, as `Folded` ends."""
    named = {key: layer.__dict__[key] for key in _NAMED if key in layer.__dict__}
    return named, layer._modules.get("adapters")


def fold_layers(model: nn.Module, entries: Mapping[str, Folded]) -> None:
    """Make these layers of `model` plain."""
    inside(model).__dict__[_FOLDED] = dict(entries)
    rest(model, [each.layer for each in entries.values() if each.is_plain])
    for each in entries.values():
        each.take_off()
        each.put(merged=True)


def unfold(model: nn.Module) -> None:
    """Patch every folded layer in `model` again as it was, on its weight W0."""
    with unchanged_if_interrupted(model):
        entries = folded(model).values()
        for each in entries:
            _reattach(each)
        rise(model, [each.layer for each in entries])
        for module in model.modules():
            module.__dict__.pop(_FOLDED, None)


def let_go(model: nn.Module) -> None:
    """What is folded in `model` is plain for good: the other weights are kept no more."""
    with marking_what_goes(model):
        forget_plain(model)
        for module in model.modules():
            module.__dict__.pop(_FOLDED, None)


@contextlib.contextmanager
def marking_what_goes(model: nn.Module) -> Iterator[None]:
    """What modifications and gates `model` has before this context and not after is `taken_out`."""
    before = _own(model)
    yield
    for key in before.keys() - _own(model).keys():
        setattr(before[key], _TAKEN_OUT, True)


def taken_out(parameter: Tensor) -> bool:
    """Whether it was a modification's or a gate's that its model has no more."""
    return getattr(parameter, _TAKEN_OUT, False)


def _own(model: nn.Module) -> dict[int, nn.Parameter]:
    return own_by_id([*all_layers(model).values(), *folded(model).values()])


@contextlib.contextmanager
def unfolded(model: nn.Module) -> Iterator[None]:
    """Within this context the folded layers of `model` are patched as they were."""
    entries = folded(model).values()
    with unchanged_if_interrupted(model, entries):
        for each in entries:
            _reattach(each)
        yield
        for each in entries:
            each.take_off()
            each.put(merged=True)


def _reattach(each: Folded) -> None:
    each.put(merged=False)
    device = holder(each.layer).device
    for part in (each.modification, each.gate):
        # Only where it has to be: what is moved forgets what it has computed of W0.
        if part is not None and any(p.device != device for p in part.parameters()):
            part.to(device)
    each.put_on()
