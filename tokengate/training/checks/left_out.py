"""What an optimiser leaves out of a patched model, moves of its base, or holds that none has.

It is said once of each. What was taken out is known at once. For what is left or moved an optimiser
is looked at before the first two steps after a model has changed, by `patch`, another adapter in
use or `fold`, and what is found twice is said: in one step another optimiser, as one for the taus
alone, may not have been called yet. Only what has a gradient tells; and only an optimiser that
holds a parameter of the model, so that one with parts of its own, as under ZeRO, says nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from tokengate.errors import LeftOutWarning, listed
from tokengate.gates.living import leader_of
from tokengate.gates.optimizer_steps import is_part, watch_steps
from tokengate.layers.changing import times_changed
from tokengate.layers.folded import folded, taken_out
from tokengate.layers.patched import ROOTS, layers, own_parameters
from tokengate.methods.adalora import AdaLoRA
from tokengate.training.checks.thawed import REMEDY, thawed
from tokengate.training.following import followed
from tokengate.training.rank_allocator import LED


@dataclass
class _Looked:
    """At an optimiser.

    Attributes:
        after: how many changes of models.
        found: what was wrong, in words.
        told: what was said.
        again: whether to do so at the next step, too.
    """

    after: int = -1
    found: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    again: bool = False


_GONE = "unpatch or merge_and_unload"
_LOOKED: WeakKeyDictionary[Optimizer, _Looked] = WeakKeyDictionary()


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    if is_part(optimizer, kwargs):
        return
    looked = _LOOKED.setdefault(optimizer, _Looked())
    changed = looked.after != times_changed()
    if not (changed or looked.again):
        return
    looked.after = times_changed()
    own, held = _ids(optimizer), {i for o in list(_LOOKED) for i in _ids(o) | followed(o)}
    gone = [p for group in optimizer.param_groups for p in group["params"] if taken_out(p)]
    if gone and _GONE not in looked.told:
        looked.told.add(_GONE)
        warnings.warn(
            f"{type(optimizer).__name__} holds {len(gone)} parameters that {_GONE} has taken "
            "out of their model, so that to step them changes nothing: make the optimizer anew, of "
            "what is to be trained now.",
            LeftOutWarning,
            stacklevel=5,
        )
    found = [
        f"{type(optimizer).__name__} {said}."
        for model in list(ROOTS)
        if not own.isdisjoint(_all_of(model))
        for said in _found(model, held, own)
    ]
    twice = [each for each in found if each in looked.found and each not in looked.told]
    looked.again = changed or any(each not in looked.found for each in found)
    if not changed:  # what is not found again was another optimizer's, which has come since
        looked.found.clear()
    looked.found.update(found)
    looked.told.update(twice)
    for each in twice:
        warnings.warn(each, LeftOutWarning, stacklevel=5)


def _all_of(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters()} | own_parameters(folded(model).values())


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _found(model: nn.Module, held: set[int], own: set[int]) -> Iterator[str]:
    """What is wrong with an optimiser of these parameters, of which others hold some, in words."""
    patched, kind = layers(model), type(model).__name__
    # What a schedule sets, unless it is to be learned after that, is moved as well.
    held = held | {
        id(layer.gate.threshold)
        for layer in patched.values()
        if layer.gate is not None
        and layer.gate.is_led
        and not getattr(leader_of(layer.gate), "_learns", False)
    }
    left = [
        f"{name}.{part}"
        for name, layer in patched.items()
        for part, p in layer.named_parameters()
        if p.requires_grad and p.grad is not None and id(p) not in held
    ]
    if left:
        yield (
            f"leaves out {listed(map(repr, left))} of this {kind}, which patch, load or fold has "
            "added and which nothing moves: make the optimizer after that, of "
            "tokengate.param_groups(model, lr), or set requires_grad_(False) on what shall stay"
        )
    moved = [name for name, weight in thawed(model).items() if id(weight) in own]
    if moved:
        yield f"moves W0 of {listed(map(repr, moved))} too, {REMEDY}"
    unled = [
        name
        for name, layer in patched.items()
        if isinstance(m := layer.modification, AdaLoRA)
        and m.options.get("target_rank") is not None
        and m not in LED
    ]
    if unled:
        yield (
            f"trains {listed(map(repr, unled))} at the full rank, where target_rank asks for less, "
            "which a tokengate.RankAllocator(model, optimizer, total_steps=...) would lead there: "
            "make one, or leave target_rank out"
        )


watch_steps(_before_step)
