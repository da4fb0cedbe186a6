"""The layers of a model whose gates have a threshold, which is set, led or followed."""

from __future__ import annotations

from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import require_layers


def with_threshold(asked: str, model: nn.Module) -> dict[str, tuple[Gated, Tensor]]:
    """They by name, and their thresholds; an error, which names who asked, if there is none."""
    found = {
        name: (layer, layer.gate.threshold)
        for name, layer in require_layers(model, asked).items()
        if layer.gate is not None and layer.gate.threshold is not None
    }
    if not found:
        raise TokenGateError(
            f"{asked} was asked of a {type(model).__name__} whose layers have no gates with a "
            "threshold: patch it with gate='threshold', 'firm' or 'fisher'."
        )
    return found
