"""All gates that live: an optimiser, and who clips, knows parameters alone. And who leads them."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from tokengate.gates.base import Gate

_gates: weakref.WeakSet[Gate] = weakref.WeakSet()
# Beside the gates, so that a copy of one is led by nobody, nor is one whose leader is gone.
_leaders: weakref.WeakKeyDictionary[Gate, weakref.ref[object]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
# Rises with each gate that is made and each parameter that one is given.
_changes, _changed = itertools.count(1), 0


def remember_gate(gate: Gate) -> None:
    """From now on `gate` is found by its parameters."""
    with _lock:
        _gates.add(gate)
    forget_holders()


def forget_holders() -> None:
    """A gate has a new parameter: which optimiser holds it is to be found out anew."""
    global _changed
    _changed = next(_changes)


def lead(gate: Gate, leader: object) -> None:
    """From now on `leader` sets the threshold of `gate`, as long as it lives."""
    _leaders[gate] = weakref.ref(leader)
    gate._was_led = False


def lead_no_more(gate: Gate) -> None:
    """Nobody does."""
    _leaders.pop(gate, None)


def leader_of(gate: Gate) -> object | None:
    """Who sets its threshold, besides its own rule."""
    found = _leaders.get(gate)
    return None if found is None else found()


def living() -> list[Gate]:
    """They all, but for one that is being made in another thread and has no parameters yet."""
    with _lock:
        gates = list(_gates)
    return [gate for gate in gates if "_parameters" in gate.__dict__]


def tau_of(gate: Gate) -> nn.Parameter | None:
    """The threshold of a gate that trains one: what moves by the rule of tau."""
    threshold = getattr(gate, "threshold", None)
    trained = isinstance(threshold, nn.Parameter) and threshold.requires_grad
    return threshold if trained else None


def living_taus() -> dict[int, Gate]:
    """Whose tau a parameter is, by the parameter's id."""
    return {id(tau): gate for gate in living() if (tau := tau_of(gate)) is not None}


def any_led(taus: Iterable[nn.Parameter]) -> bool:
    """Whether somebody leads a gate with one of these."""
    gates = living_taus()
    return any(leader_of(gates[id(tau)]) is not None for tau in taus if id(tau) in gates)


class _Held(NamedTuple):
    key: tuple[int, tuple[int, ...]]
    # The module that has it, by what name, the parameter's id, and whose it is.
    own: list[tuple[weakref.ref[nn.Module], str, int, weakref.ref[Gate]]]


# What was found last of an optimiser, while neither side has changed.
_held: weakref.WeakKeyDictionary[Optimizer, _Held] = weakref.WeakKeyDictionary()


def held_by(optimizer: Optimizer) -> list[tuple[Gate, nn.Parameter]]:
    """The parameters of gates that an optimiser holds, in its order, the same on every rank.

    It is asked in every step, of optimisers that have nothing to do with gates as well: so gates
    are listed when something is new only.
    """
    own: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    key = _changed, tuple(map(id, own))
    # FSDP2 puts its own into modules past all that tells of it.
    plain = all(type(p) in (Tensor, nn.Parameter) for p in own)
    known = _held.get(optimizer) if plain else None
    found = None if known is None or known.key != key else _as_known(known)
    if known is None or found is None:
        owners = {
            id(p): (weakref.ref(module), name, id(p), weakref.ref(gate))
            for gate in living()
            for module in gate.modules()
            for name, p in module._parameters.items()
            if p is not None
        }
        known = _held[optimizer] = _Held(key, [owners[i] for i in key[1] if i in owners])
        found = _as_known(known)
    return found or []


def _as_known(known: _Held) -> list[tuple[Gate, nn.Parameter]] | None:
    found = []
    for module, name, identity, gate in known.own:
        has, whose = module(), gate()
        p = None if has is None else has._parameters.get(name)
        if p is None or id(p) != identity or whose is None:
            return None
        found.append((whose, p))
    return found


def taus_held_by(optimizer: Optimizer) -> dict[int, Gate]:
    """Whose tau a parameter is that an optimiser holds, by the parameter's id."""
    return {id(p): gate for gate, p in held_by(optimizer) if tau_of(gate) is p}
