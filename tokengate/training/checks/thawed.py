"""W0 that is trainable though `patch` has frozen it, as after `model.requires_grad_(True)`."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from tokengate.errors import TokenGateError, listed
from tokengate.layers.patched import layers
from tokengate.linears.linear_like import LinearLike, holder

REMEDY = (
    "which patch had frozen, as after model.requires_grad_(True): call that before patch, and "
    "name what is to be trained beside the modifications in patch(train=...)"
)


def thawed(model: nn.Module) -> dict[str, Tensor]:
    """W0 of the patched layers that would train it, by the layer's name."""
    found = {n: holder(cast(LinearLike, each)) for n, each in layers(model).items()}
    return {name: weight for name, weight in found.items() if weight.requires_grad}


def refuse_thawed(model: nn.Module, asked: str) -> None:
    """An error if there is one."""
    if names := thawed(model):
        raise TokenGateError(f"{asked} found W0 of {listed(map(repr, names))} trainable, {REMEDY}.")
