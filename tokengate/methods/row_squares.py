"""The lengths of the rows of W0, and its products, as a forward that depends on them reads them.

At each call anew, for W0 is written in ways that nobody is told of. To see surely whether it was
would be to read all of it too: comparing it with a copy, or hashing it, takes longer than this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokengate.kernels.precision import trainable_dtype
from tokengate.linears.experts import StackedLinear
from tokengate.linears.linear_like import LinearLike, product, row_blocks, whole
from tokengate.linears.quantised import is_quantised


@torch.no_grad()
def row_squares(layer: LinearLike) -> Tensor:
    """||W_j||^2 of every row of W0, `(d,)`, in float32, or float64 for a float64 weight."""
    if isinstance(layer, StackedLinear):
        if layer.is_of_all and not _is_copied(layer.held):
            return _squares(layer.weight)
        return torch.stack([row_squares(linear) for linear in layer.each()])
    weight, blocks = layer.weight, 1
    if is_quantised(whole(layer)) or _is_copied(weight):
        blocks = 16  # because what is summed in another dtype is copied to it first
    return torch.cat([_squares(block) for block in row_blocks(layer, blocks)])


@torch.no_grad()
def row_squares_and_products(layer: LinearLike, right: Tensor) -> tuple[Tensor, Tensor]:
    """`row_squares`, and W0 `right`, `(k, r) -> (d, r)`; a quantised W0 is read once for both."""
    if isinstance(layer, StackedLinear):
        return row_squares(layer), layer.product(right.to(layer.held.dtype))
    if not is_quantised(whole(layer)):
        return row_squares(layer), product(layer, right)
    parts = [(_squares(block), block @ right.to(block.dtype)) for block in row_blocks(layer)]
    squares, products = zip(*parts, strict=True)
    return torch.cat(squares), torch.cat(products)


def _is_copied(weight: Tensor) -> bool:
    """Whether it is made of another dtype before it is summed."""
    return weight.dtype != trainable_dtype(weight)


def _squares(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=-1, dtype=trainable_dtype(block))
    return norms.square()
