"""What a patch would cost, counted on a model that may have no values (on the meta device)."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokengate.adapters.base_model import class_name
from tokengate.adapters.inspection import all_options, layer_table, option_lines, sizes
from tokengate.adapters.saving import trained_beside
from tokengate.files.text_table import lines, size, text_table
from tokengate.gates.threshold import TokenGate
from tokengate.layers.patched import require_layers
from tokengate.methods.registry import METHODS


def count_patched(model: nn.Module) -> dict[str, Any]:
    """Layers, parameters and bytes of a patched model, ready for JSON.

    Memory is that of parameters, of the gradients of those that are trained, and of Adam's two
    states for them; activations come on top.

    Raises:
        TokenGateError: no layer of the model is patched.
    """
    patched = require_layers(model, "plan")
    beside = trained_beside(model, patched)
    layers = {}
    for name, layer in patched.items():
        modification = layer.modification
        method = METHODS.name_of(type(modification)) or type(modification).__name__
        layers[name] = {
            "method": method,
            **sizes(modification.in_features, modification.out_features),
            "options": all_options(method, modification.options),
            "parameters": sum(p.numel() for p in modification.parameters()),
            "tau": None,
        }
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    total, trainable = (sum(p.numel() for p in each) for each in (parameters, trained))
    size_of_trained = sum(p.nbytes for p in trained)
    dtypes = sorted(
        {str(p.dtype).removeprefix("torch.") for p in parameters if not p.requires_grad}
    )
    return {
        "model": class_name(model),
        "parameters": total,
        "trainable": trainable,
        "trainable_share": trainable / total,
        "modifications": sum(layer["parameters"] for layer in layers.values()),
        "taus": sum(
            layer.gate.tau.numel()
            for layer in patched.values()
            if isinstance(layer.gate, TokenGate)
        ),
        "trained_beside": {name: list(p.shape) for name, p in beside.items()},
        "frozen_dtypes": dtypes,
        "bytes": {
            "frozen parameters": sum(p.nbytes for p in parameters) - size_of_trained,
            "trained parameters": size_of_trained,
            "gradients": size_of_trained,
            "Adam's states": 2 * size_of_trained,
        },
        "layers": layers,
    }


def plan_text(plan: dict[str, Any]) -> str:
    """For people to read."""
    said = [
        f"{plan['model']}: {len(plan['layers'])} layers would be patched",
        f"{plan['trainable']:,} of {plan['parameters']:,} parameters trained "
        f"({100 * plan['trainable_share']:.3f} %): {plan['modifications']:,} of modifications, "
        f"{plan['taus']:,} taus, {len(plan['trained_beside'])} others",
    ]
    said += [f"trained beside: {name} {shape}" for name, shape in plan["trained_beside"].items()]
    said += option_lines(plan["layers"])
    dtypes = ", ".join(plan["frozen_dtypes"])
    said.append(f"frozen parameters taken as {dtypes} (--dtype takes another)")
    memory = {**plan["bytes"], "together, without activations": sum(plan["bytes"].values())}
    table = text_table(["memory", ""], [[name, size(n)] for name, n in memory.items()])
    return f"{lines(said)}\n\n{layer_table(plan['layers'])}\n\n{table}"
