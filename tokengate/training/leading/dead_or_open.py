"""Gates that train into nothing: closed everywhere, or open everywhere. It is said once.

A loss that falls tells nothing of it. A tau above 0 before M(x) has grown closes all positions,
which then get no gradient ever after. One that moves in steps too large for r does so later, and
one in steps too small closes nothing. What is closed is looked at in few steps, and what that takes
counted in these alone, so that the others cost nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tokengate.errors import TokenGateError, UselessGateWarning
from tokengate.gates.base import Gate, LedGate
from tokengate.gates.living import held_by, leader_of, living, tau_of
from tokengate.gates.optimizer_steps import watch_steps
from tokengate.gates.score_counts import no_counts, share_below
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import ROOTS, layers
from tokengate.sharding import local_part, numbers_here
from tokengate.training.following import followed
from tokengate.training.leading.pace import moved_by
from tokengate.training.rank_allocator import LED
from tokengate.training.wrapped_optimizers import Follower

# At which steps it is looked, and from which one on a gate that closes nothing is worth a word.
_LOOKS, _PATIENCE = (16, 64, 256, 1024), 64
# At which step somebody should have begun to lead what does not learn.
_LEAD = 8
# What is all positions: some that are never closed, where w is 0, are in every batch.
_ALL = 0.99
# How many steps an optimiser has taken, and which ones have been told of.
_STEPS: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_TOLD: WeakSet[Optimizer] = WeakSet()
# Of which gates it was said that nobody leads them, or who does not.
_TOLD_OF: WeakSet[Gate] = WeakSet()
_REMEDY = (
    "have a wanted share closed by tokengate.SparsitySchedule, or pass total_steps= to "
    "param_groups and no s"
)
_OTHERS = (
    "have it begin elsewhere, by gate_options= (of a sigmoid {'start': 0}), take a larger lr or "
    "more steps, or have a wanted share closed by another gate and tokengate.SparsitySchedule"
)

# What it closes below, and whose that is.
Own = list[tuple[Tensor, Gate]]


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if isinstance(optimizer, Follower) and not any(moved_by(optimizer)):
        return  # a trial, which is put back
    if not any(map(_moves, optimizer.param_groups)):
        return  # as in the step by which torch makes an optimiser's state
    step = _STEPS[optimizer] = _STEPS.get(optimizer, 0) + 1
    if step == _LEAD:
        _tell_of_unled(optimizer)
    if step == 1:
        _refuse_stillborn(optimizer)
    if optimizer in _TOLD or not (step in _LOOKS or step + 1 in _LOOKS):
        return
    taus: Own = [(tau, gate) for tau, gate in moved_by(optimizer) if not gate.is_led]
    others: Own = [
        (torch.tensor([gate.closes_below], device=gate._place()), gate)
        for gate in dict.fromkeys(gate for gate, _ in held_by(optimizer))
        if gate.closes_below is not None
    ]
    for own in (taus, others):
        if own and step in _LOOKS and optimizer not in _TOLD:
            _look(optimizer, own, step)
        for limit, gate in own:
            if not gate.relative:  # which counts at every step
                gate._looked = no_counts(limit.device) if step + 1 in _LOOKS else None


def _moves(group: dict[str, Any]) -> bool:
    """Whether its learning rate is above 0, or is not known without waiting for a device."""
    lr = group.get("lr", 1.0)
    return (isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0


def _refuse_stillborn(optimizer: Optimizer) -> None:
    """A tau above 0 before what is 0 and has gradients of 0, without lambda's part: all is closed.

    A tau that is not trained has no gradient of its own, and no other way to move.
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]} | followed(optimizer)
    taus = [tau for gate in living() if not gate.is_led and (tau := tau_of(gate)) is not None]
    given = [tau for tau in taus if tau.grad is not None and id(tau) in own]
    gradients = numbers_here(tau.grad for tau in given if tau.grad is not None)
    pairs = zip(numbers_here(given), gradients, strict=True)
    found = [(tau, bool(gradient)) for tau, gradient in pairs if tau is not None and tau > 0]
    frozen = [
        (gate.threshold, layer.modification)
        for layer in _layers_of(own)
        if (gate := layer.gate) is not None and not gate.is_led and tau_of(gate) is None
        and gate.threshold is not None and not gate.threshold.is_meta
    ]  # fmt: skip
    numbers = iter(numbers_here(tau for tau, _ in frozen))
    for threshold, modification in frozen:
        largest = max(next(numbers) or 0 for _ in range(threshold.numel() or 1))
        if largest > 0 and (stays := _stays_0(modification)) is not None:
            found.append((largest, not stays))
    # One layer alone may have seen no position in this step, as an expert.
    if found and not any(lives for _, lives in found):
        raise TokenGateError(
            f"tau is {found[0][0]:g} in front of {len(found)} modifications that are 0 everywhere, "
            "as new ones are: all positions are closed, and nothing ever gets a gradient; patch "
            "with tau=0 and have a wanted share closed by tokengate.SparsitySchedule, or by "
            "tokengate.calibrate after training."
        )


def _stays_0(modification: nn.Module) -> bool | None:
    """Whether a part that is 0, as makes M(x) so, has a gradient of 0; None without gradients."""
    trained = [p for p in modification.parameters() if p.grad is not None]
    if not trained:
        return None
    zeros = [p for p in trained if not bool(local_part(p.detach()).any())]
    return any(not bool(local_part(p.grad).any()) for p in zeros if p.grad is not None)


def _layers_of(held: set[int]) -> list[Gated]:
    """The patched layers of the models of which somebody holds a parameter."""
    models = [m for m in list(ROOTS) if not held.isdisjoint(map(id, m.parameters()))]
    return [layer for model in models for layer in layers(model).values()]


def _tell_of_unled(optimizer: Optimizer) -> None:
    # Such a gate has no parameter, so its model's tell whose it is.
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = _layers_of(held)
    moved = [la for la in found if not held.isdisjoint(map(id, la.modification.parameters()))]
    gates = dict.fromkeys(layer.gate for layer in moved)
    copies = [g for g in gates if g and g._was_led and not g.is_led and g not in _TOLD_OF]
    if copies:
        _tell(
            optimizer,
            copies,
            "and are copies of ones that a SparsitySchedule led, which leads no copy: make one for "
            "this model and optimizer, and load the state_dict() of the other there",
        )
    led = [gate for gate in gates if isinstance(gate, LedGate) and gate.trained]
    unled = [g for g in led if not g.is_led and g not in _TOLD_OF]
    if unled:
        _tell(
            optimizer,
            unled,
            "and no SparsitySchedule leads them, so that their thresholds stay where they are "
            "while M(x) grows, and those of 0 close nothing: make one with "
            "tokengate.SparsitySchedule(model, optimizer, target, total_steps)",
        )
    waiting = [
        gate
        for gate in gates
        if gate is not None
        and gate not in _TOLD_OF
        and getattr(leader_of(gate), "steps", None) == 0
    ]
    if waiting:
        _tell(
            optimizer,
            waiting,
            "and the optimizer of the SparsitySchedule that leads them has taken none, so that it "
            "closes nothing: make it with the optimizer that trains them",
        )


def _tell(optimizer: Optimizer, gates: Sequence[Gate], found: str) -> None:
    _TOLD_OF.update(gates)  # once, whoever else takes a step
    warnings.warn(
        f"{len(gates)} gates, e.g. {type(gates[0]).__name__}, have been trained for {_LEAD} "
        f"steps of {type(optimizer).__name__} {found}.",
        UselessGateWarning,
        stacklevel=7,
    )


def _look(optimizer: Optimizer, own: Own, step: int) -> None:
    closed, largest, at_0 = [], 0.0, set()
    for tau, gate in own:
        seen = gate._seen if gate.relative else gate._looked
        here = local_part(tau.detach()).reshape(-1)
        if seen is None or not here.numel() or not bool(seen.any()):
            continue
        # Experts have one each; what was seen is of them all.
        log = here.clamp(min=0).to(seen).log2()
        closed.append(float(share_below(seen.expand(len(log), -1), log).mean()))
        largest = max(largest, float(here.max()))
        if closed[-1] == 1 and not bool(seen[1:].any()):  # r is 0 at all positions
            at_0.add(gate)
    if not closed:
        return
    share = sum(closed) / len(closed)
    # Not those that a RankAllocator has pruned.
    lifeless = sum(
        layer.gate in at_0 and layer.modification not in LED and bool(_stays_0(layer.modification))
        for layer in (_layers_of({id(tau) for tau, _ in own}) if at_0 else [])
    )
    if 0 < lifeless < len(closed):
        found = f"stands before modifications that are 0 everywhere in {lifeless} of"
    elif share > _ALL:
        found = "closes all positions in"
    elif share == 0 and step >= _PATIENCE:
        found = "closes no position in"
    else:
        return
    _TOLD.add(optimizer)
    gate = own[0][1]
    what, remedy = f"tau, up to {largest:.2g},", _REMEDY
    if gate.closes_below is not None:
        what, remedy = f"{type(gate).__name__}, in evaluation,", _OTHERS
    warnings.warn(
        f"after {step} steps of {type(optimizer).__name__} {what} {found} the {len(closed)} layers "
        f"with a gate: {remedy}.",
        UselessGateWarning,
        stacklevel=6,
    )


watch_steps(_before_step)
