"""What an optimiser leaves out of a patched model, or moves of its base: said once of each.

It is looked at before the second step: in the first one another optimiser, as one for the taus
alone, may not have been called yet. Only what has a gradient tells; and only an optimiser that
holds a parameter of the model, so that one with parts of its own, as under ZeRO, says nothing. And
again after `fold`, where experts that stay gated have parameters of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from tokengate.errors import LeftOutWarning, listed
from tokengate.gates.optimizer_steps import is_part, watch_steps
from tokengate.layers.folded import folded
from tokengate.layers.patched import ROOTS, layers, own_parameters
from tokengate.methods.adalora import AdaLoRA
from tokengate.training.checks.thawed import REMEDY, thawed
from tokengate.training.following import followed
from tokengate.training.rank_allocator import LED

# How often each optimiser has been about to step, since there was something new to look at.
_STEPS: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    if is_part(optimizer, kwargs):
        return
    _STEPS[optimizer] = steps = _STEPS.get(optimizer, 0) + 1
    if steps != 2:
        return
    own, held = _ids(optimizer), {i for each in list(_STEPS) for i in _ids(each) | followed(each)}
    for model in list(ROOTS):
        there = {id(p) for p in model.parameters()} | own_parameters(folded(model).values())
        if not own.isdisjoint(there):
            for said in _found(model, held, own):
                warnings.warn(f"{type(optimizer).__name__} {said}.", LeftOutWarning, stacklevel=5)


def look_again(parameters: Iterable[nn.Parameter]) -> None:
    """Of the optimisers that hold any of these, which are the model's no more."""
    replaced = {id(p) for p in parameters}
    for optimizer in [each for each in list(_STEPS) if not replaced.isdisjoint(_ids(each))]:
        _STEPS[optimizer] = 0


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _found(model: nn.Module, held: set[int], own: set[int]) -> Iterator[str]:
    """What is wrong with an optimiser of these parameters, of which others hold some, in words."""
    patched, kind = layers(model), type(model).__name__
    left = [
        f"{name}.{part}"
        for name, layer in patched.items()
        for part, p in layer.named_parameters()
        if p.requires_grad and p.grad is not None and id(p) not in held
    ]
    if left:
        yield (
            f"leaves out {listed(map(repr, left))} of this {kind}, which patch or fold has added "
            "and which nothing moves: make the optimizer after that, of "
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
