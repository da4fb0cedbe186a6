"""All gates that live: an optimiser, and who clips, knows parameters alone. And who leads them."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from tokengate.gates.base import Gate

_gates: weakref.WeakSet[Gate] = weakref.WeakSet()
# Beside the gates, so that a copy of one is led by nobody, nor is one whose leader is gone.
_leaders: weakref.WeakKeyDictionary[Gate, weakref.ref[object]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def remember_gate(gate: Gate) -> None:
    """From now on `gate` is found by its parameters."""
    with _lock:
        _gates.add(gate)


def lead(gate: Gate, leader: object) -> None:
    """From now on `leader` sets the threshold of `gate`, as long as it lives."""
    _leaders[gate] = weakref.ref(leader)


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
