"""The squared row norms of a frozen weight, computed once for as long as it does not change."""

from __future__ import annotations

import torch
from torch import Tensor

from tokengate.precision import trainable_dtype


class RowSquares:
    """||W_j||^2 of every row of the weight it is asked about, `(d, k) -> (d,)`, and remembered.

    What is remembered holds for one tensor object, its memory and its version, which every
    in-place operation raises. PyTorch does not see writes through `weight.data`: call `forget`
    after those, and where a module is loaded, cast or moved, which may go that way too.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._squares: Tensor | None = None

    def of(self, weight: Tensor, transposed: bool = False) -> Tensor:
        """In float32, or float64 for a float64 weight; `transposed` for columns, not rows."""
        # A compiled forward keeps no state.
        key = None if torch.compiler.is_compiling() else _key(weight)
        if key is None:
            return _squares(weight.T if transposed else weight)
        if self._squares is None or self._key != key:
            self._squares = _squares(weight.T if transposed else weight)
            self._key = key
        return self._squares

    def forget(self) -> None:
        """Compute anew when asked next."""
        self._key = self._squares = None

    def __reduce__(self) -> tuple[type[RowSquares], tuple[()]]:
        # A copy stands beside a copied weight.
        return RowSquares, ()


def _squares(weight: Tensor) -> Tensor:
    with torch.no_grad():
        dtype = trainable_dtype(weight)
        # Block by block, because what is summed in another dtype is copied to it first.
        blocks = torch.split(weight, max(1, -(-len(weight) // 16)))
        norms = [torch.linalg.vector_norm(block, dim=1, dtype=dtype) for block in blocks]
        return torch.cat(norms).square()


def _key(weight: Tensor) -> tuple[object, ...] | None:
    try:
        return id(weight), weight.data_ptr(), weight._version, weight.dtype, weight.device
    except RuntimeError:
        # Inference tensors have no version, tensors inside of torch.func transforms no memory.
        return None
