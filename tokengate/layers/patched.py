"""Which layers of a model are patched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.layers.gated_linear import Gated
from tokengate.names import named_modules


def layers(model: nn.Module) -> dict[str, Gated]:
    """The patched layers of `model` by name, in the model's order; a shared layer once.

    Names are the model's own, whatever wraps it or a part of it.
    """
    return {n: m for n, m in all_layers(model).items() if m.modification is not None}


def own_parameters(patched: Iterable[Any]) -> set[int]:
    """The ids of what modifications and gates have, of patched or folded layers."""
    parts = (part for layer in patched for part in (layer.modification, layer.gate))
    return {id(p) for part in parts if part is not None for p in part.parameters()}


def all_layers(model: nn.Module) -> dict[str, Gated]:
    """Those, too, that the adapter in use does not modify."""
    if not isinstance(model, nn.Module):
        raise TokenGateError(f"{brief(model)} has no layers: pass a torch.nn.Module.")
    return {name: m for name, m in named_modules(model) if isinstance(m, Gated)}


def require_layers(model: nn.Module, asked: str) -> dict[str, Gated]:
    """`layers(model)`; an error that names the function `asked` if there is none."""
    patched = layers(model)
    if not patched and all_layers(model):
        raise TokenGateError(
            f"{asked} was asked of a model none of whose adapters is in use: call "
            "tokengate.use(model, name) first."
        )
    if not patched:
        raise TokenGateError(
            f"{asked} was asked of a {type(model).__name__} without a patched layer: call "
            "tokengate.patch(model, targets=...) first, and pass that model."
        )
    return patched
