"""Layers that compute W0 x + b: `nn.Linear`, and transformers' `Conv1D`, with W0 transposed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tokengate.by_name import is_from
from tokengate.quantised import dequantised_blocks, is_quantised

# To a type checker, Conv1D looks as nn.Linear does.
LinearLike: TypeAlias = nn.Linear

# A block of rows is one of about so many, which bounds what reading W0 takes beside it.
_BLOCKS = 16


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can be patched as a linear layer."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is `(in_features, out_features)`."""
    return is_from(module, "transformers", "Conv1D")


def features_of(layer: LinearLike) -> tuple[int, int]:
    """`in_features` and `out_features`."""
    if is_transposed(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def row_blocks(layer: LinearLike) -> Iterator[Tensor]:
    """W0 in about 16 consecutive blocks of rows, `(rows, in_features)`, dense and floating.

    Views of the layer's weight, or one block after the other dequantised, so that there is never
    a whole dense copy of a quantised W0.
    """
    if is_quantised(layer):
        return dequantised_blocks(layer, _share(features_of(layer)[1]))
    weight = _dense(layer)
    return iter(torch.split(weight, _share(len(weight))))


def product(layer: LinearLike, right: Tensor) -> Tensor:
    """W0 `right`, `(in_features, r) -> (out_features, r)`, computed in the dtype W0 is read in."""
    if is_quantised(layer):
        return torch.cat([block @ right.to(block.dtype) for block in row_blocks(layer)])
    weight = _dense(layer)
    return weight @ right.to(weight.dtype)


def _dense(layer: LinearLike) -> Tensor:
    return layer.weight.T if is_transposed(layer) else layer.weight


def _share(rows: int) -> int:
    return max(1, -(-rows // _BLOCKS))
