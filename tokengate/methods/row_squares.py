"""The squared row norms of a frozen weight, computed once for as long as it does not change."""

from __future__ import annotations

import torch
from torch import Tensor

from tokengate.kernels.precision import trainable_dtype
from tokengate.linears.linear_like import LinearLike, row_blocks, whole
from tokengate.linears.quantised import is_four_bit
from tokengate.methods.remembered import Remembered


class RowSquares:
    """||W_j||^2 of every row of the W0 of the layer it is asked about, `(d,)`, and remembered.

    What is remembered holds for one tensor object, its memory and its version: see `Remembered`. A
    weight that is a view, made anew at each use, is known by the tensor it is a view of.
    """

    def __init__(self) -> None:
        self._squares: Remembered[Tensor] = Remembered()

    def of(self, layer: LinearLike) -> Tensor:
        """In float32, or float64 for a float64 weight."""
        key = weight_key(layer)
        return (
            _squares(layer) if key is None else self._squares.of(key, (), lambda: _squares(layer))
        )

    def forget(self) -> None:
        """Compute anew when asked next."""
        self._squares.forget()


def weight_key(layer: LinearLike) -> tuple[object, ...] | None:
    """What stays equal while W0 does; None where it has neither a version nor an address.

    Not the tensor itself, which offloading replaces at every use to free its memory.
    """
    if torch.compiler.is_compiling():
        return None
    layer = whole(layer)
    weight = layer.weight
    try:
        owner = weight if weight._base is None else weight._base
        if is_four_bit(layer):
            # bitsandbytes may move it into another layout in the middle of a forward, and rounds
            # its scales there: with norms that followed, DoRA would not be a no-op at first.
            return id(owner), owner._version
        place = weight.data_ptr(), weight.shape, weight.stride(), weight.device
        return id(owner), owner._version, weight.dtype, *place
    except RuntimeError:
        # Inference tensors have no version, tensors inside of torch.func transforms no memory.
        return None


def _squares(layer: LinearLike) -> Tensor:
    with torch.no_grad():
        # Block by block, because what is summed in another dtype is copied to it first.
        norms = [
            torch.linalg.vector_norm(block, dim=1, dtype=trainable_dtype(block))
            for block in row_blocks(layer)
        ]
        return torch.cat(norms).square()
