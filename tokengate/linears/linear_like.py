"""Layers that compute W0 x + b: `nn.Linear`, transformers' `Conv1D`, a part of a fused layer.

And `nn.Conv2d`, whose positions are the pixels of its output and whose x_i are patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokengate.linears.by_name import is_from
from tokengate.linears.convolution import (
    Patches,
    channels_first,
    channels_last,
    is_convolution,
    product_by_groups,
)
from tokengate.linears.experts import StackedLinear
from tokengate.linears.quantised import dequantised_blocks, is_quantised
from tokengate.linears.slices import Slices

# To a type checker, Conv1D and Conv2d look as nn.Linear does.
LinearLike: TypeAlias = nn.Linear

# A block of rows is one of about so many, which bounds what reading W0 takes beside it.
_BLOCKS = 16


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, which "all-linear" means."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_linear_like(module: nn.Module) -> bool:
    """Whether `module` can be patched as a linear layer: a convolution, too."""
    return is_linear(module) or is_convolution(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is `(in_features, out_features)`."""
    return is_from(module, "transformers", "Conv1D")


def features_of(layer: LinearLike) -> tuple[int, int]:
    """`in_features` and `out_features`."""
    if is_transposed(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    if is_convolution(layer):
        return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels
    return layer.in_features, layer.out_features


def groups_of(layer: LinearLike) -> int:
    """In how many groups of channels a convolution is divided; else 1."""
    return layer.groups if is_convolution(layer) else 1


def stub_of(
    layer: LinearLike, in_features: int, out_features: int, dtype: torch.dtype
) -> nn.Module:
    """One without memory, of these sizes; as a convolution is divided, if it is one."""
    own: dict[str, Any] = {"bias": False, "device": "meta", "dtype": dtype}
    if is_convolution(layer):
        kernel: Any = layer.kernel_size
        return nn.Conv2d(layer.in_channels, layer.out_channels, kernel, groups=layer.groups, **own)
    return nn.Linear(in_features, out_features, **own)


def inputs_of(layer: LinearLike, input: Tensor) -> Tensor | Patches:
    """x of each position: `(..., in_features)`, of a convolution not made yet."""
    return Patches(input, layer) if is_convolution(layer) else input


def positions_of(layer: LinearLike, input: Tensor) -> torch.Size:
    """The shape of the positions of a call: `(...)`, of a convolution `(B, H, W)`."""
    return Patches(input, layer).positions if is_convolution(layer) else input.shape[:-1]


def by_position(layer: LinearLike, out: Tensor) -> Tensor:
    """A layer's output with its channels last, `(..., out_features)`."""
    return channels_last(out) if is_convolution(layer) else out


def as_output(layer: LinearLike, h: Tensor, out: Tensor) -> Tensor:
    """`(..., out_features)` in the layout of the layer's own output, `out`."""
    return channels_first(h, out) if is_convolution(layer) else h


def is_unbatched(layer: LinearLike, input: Tensor) -> bool:
    """Whether it is the input of a convolution without a dimension for the batch."""
    return is_convolution(layer) and input.dim() == 3


def whole(layer: LinearLike) -> LinearLike:
    """The layer that has the weight: of a slice the fused one, of others themselves."""
    return layer.fused if isinstance(layer, LinearSlice) else layer


def row_blocks(layer: LinearLike, blocks: int = _BLOCKS) -> Iterator[Tensor]:
    """W0 in about so many consecutive blocks, `(rows, in_features)`, dense and floating; of a
    grouped convolution without the zeros between the groups.

    Views of the layer's weight, or one block after the other dequantised, so that there is never
    a whole dense copy of a quantised W0.
    """
    if isinstance(layer, LinearSlice):
        return layer.row_blocks(blocks)
    if is_quantised(layer):
        return dequantised_blocks(layer, _share(features_of(layer)[1], blocks))
    weight = _dense(layer)
    return iter(torch.split(weight, _share(len(weight), blocks)))


def product(layer: LinearLike, right: Tensor) -> Tensor:
    """W0 `right`, `(in_features, r) -> (out_features, r)`, in the dtype of W0, not quantised."""
    if isinstance(layer, LinearSlice) and layer.slices.groups > 1:  # whose weight is a copy
        return layer.slices.take(product(layer.fused, right), layer.name, 0)
    if is_convolution(layer):
        return product_by_groups(layer, right)
    weight = _dense(layer)
    return weight @ right.to(weight.dtype)


def in_memory(layer: LinearLike) -> Tensor | None:
    """W0, `(out_features, in_features)`, of any strides; None where to have it takes making it."""
    made = groups_of(layer) > 1 or (isinstance(layer, LinearSlice) and layer.slices.groups > 1)
    return None if made or is_quantised(whole(layer)) else _dense(layer)


def holder(layer: LinearLike) -> Tensor:
    """The tensor that has the values of its weight, of which this may be a view."""
    if isinstance(layer, StackedLinear):
        return layer.held
    weight = whole(layer).weight
    return weight if weight._base is None else weight._base


def has_own_weight(layer: LinearLike) -> bool:
    """Whether its weight is a parameter, and no part of another module's."""
    return isinstance(layer.weight, nn.Parameter)


@torch.no_grad()
def write_rows(layer: LinearLike, rows: Tensor) -> None:
    """Write `(out_features, in_features)` over a weight that is rows of another's, in place."""
    if isinstance(layer, StackedLinear):
        layer.write(rows)
    elif isinstance(layer, LinearSlice):
        layer.slices.write(_dense(layer.fused).data, layer.name, rows)
    else:
        layer.weight.data.copy_(rows)


def in_layout(layer: LinearLike, rows: Tensor) -> Tensor:
    """`(out_features, in_features)` as the layer's weight is laid out."""
    if is_convolution(layer):
        return torch.empty_like(layer.weight, dtype=rows.dtype).copy_(rows.view(layer.weight.shape))
    return rows.T.contiguous() if is_transposed(layer) else rows


def _dense(layer: LinearLike) -> Tensor:
    if is_convolution(layer):
        return layer.weight.flatten(1)
    return layer.weight.T if is_transposed(layer) else layer.weight


def _share(rows: int, blocks: int) -> int:
    return max(1, -(-rows // blocks))


class LinearSlice(nn.Module):
    """One projection of a fused linear layer: `(..., in_features) -> (..., out_features)`.

    It has no parameters of its own: `weight` and `bias` are the fused layer's.

    Args:
        fused: the layer.
        slices: what it holds.
        name: which of them this is.
    """

    fused: LinearLike

    def __init__(self, fused: LinearLike, slices: Slices, name: str) -> None:
        super().__init__()
        # Past nn.Module, which would make the layer a child of its own child.
        object.__setattr__(self, "fused", fused)
        self.slices, self.name = slices, name
        self.training = fused.training
        self.in_features = features_of(fused)[0]
        self.out_features = slices.groups * slices.sizes[name]

    @property
    def weight(self) -> Tensor:
        """`(out_features, in_features)`, a view where the rows are in one group; of a quantised
        layer the whole weight, in which rows are not apart.
        """
        if is_quantised(self.fused):
            return self.fused.weight
        return self.slices.take(_dense(self.fused), self.name, 0)

    @property
    def bias(self) -> Tensor | None:
        """`(out_features,)`, or None."""
        return None if self.fused.bias is None else self.slices.take(self.fused.bias, self.name)

    def forward(self, input: Tensor, out: Tensor) -> Tensor:
        """`out`, which is this projection of `input` as the fused layer computed it."""
        return out

    def row_blocks(self, blocks: int) -> Iterator[Tensor]:
        """Its rows in the order of the fused layer's; see the function of this name."""
        start, size = self.slices.place(self.name)
        step = sum(self.slices.sizes.values())
        at = 0
        for block in row_blocks(self.fused, blocks):
            # Groups of which this block holds a part.
            for group in range(at // step, -(-(at + len(block)) // step)):
                first = max(group * step + start, at)
                last = min(group * step + start + size, at + len(block))
                if first < last:
                    yield block[first - at : last - at]
            at += len(block)

    def extra_repr(self) -> str:
        return f"{self.name} of {self.slices}"
