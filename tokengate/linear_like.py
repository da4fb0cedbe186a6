"""Layers that compute W0 x + b: `nn.Linear`, and transformers' `Conv1D`, with W0 transposed."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

# Conv1D is known by its name, because importing its library would cost what most users do not use;
# to a type checker it looks as nn.Linear does.
LinearLike: TypeAlias = nn.Linear


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can be patched as a linear layer."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is `(in_features, out_features)`."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )


def weight_of(layer: LinearLike) -> Tensor:
    """W0, `(out_features, in_features)`; a view of the layer's own weight."""
    return layer.weight.T if is_transposed(layer) else layer.weight


def features_of(layer: LinearLike) -> tuple[int, int]:
    """`in_features` and `out_features`."""
    if is_transposed(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features
