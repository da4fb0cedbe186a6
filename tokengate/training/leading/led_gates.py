"""Which gates a SparsitySchedule may lead."""

from __future__ import annotations

from torch import nn

from tokengate.errors import TokenGateError
from tokengate.gates.base import Gate
from tokengate.layers.patched import require_layers


def gates_to_lead(model: nn.Module) -> dict[str, Gate]:
    """Those with a threshold, by layer.

    Raises:
        TokenGateError: there is none, or one is led already.
    """
    gates = {
        name: layer.gate
        for name, layer in require_layers(model, "SparsitySchedule").items()
        if layer.gate is not None and layer.gate.threshold is not None
    }
    if not gates:
        raise TokenGateError(
            f"SparsitySchedule was asked of a {type(model).__name__} none of whose layers has a "
            "gate with a threshold: patch it with gate='threshold', 'firm' or 'fisher'."
        )
    for name, gate in gates.items():
        if gate.is_led:
            raise TokenGateError(
                f"{name!r} has a SparsitySchedule already: call its detach() first (that of an "
                "interrupted Trainer's callback is callback.sparsity_schedule)."
            )
    return gates
