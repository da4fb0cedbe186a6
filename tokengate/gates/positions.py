"""What a gate is told of the positions of one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengate.kernels.change import Change
from tokengate.kernels.factors import Factors, Learn
from tokengate.kernels.groups import Groups
from tokengate.kernels.norms import Norms, ratios


class Positions:
    """The positions of one call of a layer, of shape `(...)`; computed when asked for.

    Sizes are in `dtype`, float32, or float64 where the layer is. Gradients flow through r, m_norm
    and w_norm into M(x) and w; where they are not wanted, take `.detach()`.

    Args:
        change: M(x) beside the output of the layer.
        x: the layer's input, `(..., in_features)`; or what can be `made()` it.
        mask: `(...)`; 0 where a position is padding, or None.
    """

    def __init__(self, change: Change, x: Any = None, mask: Tensor | None = None) -> None:
        self._change, self._x, self.mask = change, x, mask

    @property
    def shape(self) -> torch.Size:
        """`(...)`."""
        return self._change.out.shape[:-1]

    @property
    def groups(self) -> Groups | None:
        """Whose the positions are, `(N,)`, where they are of several layers, as experts."""
        return self._change.groups

    @property
    def dtype(self) -> torch.dtype:
        """What a is to be in, and the sizes are."""
        return self._change.dtype

    @property
    def x(self) -> Tensor:
        """The layer's input, `(..., in_features)`; of a convolution its patches."""
        if not isinstance(self._x, Tensor):
            self._x = self._x.made()
        x: Tensor = self._x
        return x

    @property
    def z(self) -> Tensor | None:
        """The input in the low-rank space, `(..., rank)`; None where the method has no factors."""
        return self._change.m.z if isinstance(self._change.m, Factors) else None

    def learn(self, call: Learn) -> None:
        """In backward, `call(z, g)`: g_i = dL/dz_i as if a_i were 1, `(..., rank)`.

        Without factors `call(m, g)` with g_i = dL/dm_i, `(..., out_features)`. Once for each
        backward of this call, also where activations are computed again. Compiled code takes it
        into its graph: there it may write to tensors in place, and to nothing else.
        """
        self._change.learn = call

    def selects(self, a: Tensor, is_open: Tensor) -> None:
        """That the weights `a` are 1 where `is_open` and 0 elsewhere; it saves multiplying."""
        self._change.selects(a, is_open)

    @property
    def norms(self) -> tuple[Norms, Norms]:
        """||m_i|| and ||w_i|| as n p, p powers of two: no size overflows; as constants."""
        return self._change.norms()

    def decided(self, tau: Tensor, dtype: torch.dtype) -> Tensor:
        """S of eq. 4, `(...)`, as a constant: booleans, or numbers in `dtype`."""
        return self._change.decided(tau, dtype)

    @property
    def r(self) -> Tensor:
        """r_i = ||m_i|| / ||w_i|| of eq. 4, `(...)`; infinite where w_i = 0 or m_i has a NaN."""
        return ratios((self.m_norm, 1.0), (self.w_norm, 1.0))

    @property
    def m_norm(self) -> Tensor:
        """||m_i||, `(...)`."""
        return self._change.size_of_m()

    @property
    def w_norm(self) -> Tensor:
        """||w_i|| = ||W0 x_i||, `(...)`."""
        return self._change.size_of_w()
