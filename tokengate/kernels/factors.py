"""A modification in factored form, from which its norm and its gradients follow without it.

M(x_i) of every low-rank method is `up z_i`, with z_i in R^r, plus for DoRA `gain * w_i`. What its
gate learns from, mu_i = <G_i, m_i> (eq. 10), is then <up' G_i, z_i> + <gain * G_i, w_i>: backward
needs z and `up`, not M(x) itself, which is as large as the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tokengate.errors import TokenGateError
from tokengate.kernels.dropped_linear import dropped_linear
from tokengate.kernels.groups import Groups, grouped_product
from tokengate.kernels.precision import without_autocast

# What is called in backward with z and its gradient, `(..., rank)` both; of M(x) without factors
# with that, `(..., out_features)`.
Learn: TypeAlias = Callable[[Tensor, Tensor], None]


@dataclass
class Factors:
    """M(x_i) = up z_i + gain * w_i, in the dtype of `w`.

    Attributes:
        z: the inputs in the low-rank space, `(..., rank)`.
        up: `(out_features, rank)`; with groups those of each layer, `(E, out_features, rank)`.
        gain: `(out_features,)`, or None for 0; with groups `(E, out_features)`.
        groups: whose the positions are, `(N,)`, where they are of several layers.
        undropped: gives them as they would be without dropout; None where there is none.
    """

    z: Tensor
    up: Tensor
    gain: Tensor | None = None
    groups: Groups | None = None
    undropped: Callable[[], Factors] | None = None

    def product(self, w: Tensor) -> Tensor:
        """M(x), multiplied out: `(..., out_features) -> (..., out_features)`.

        Raises:
            TokenGateError: shapes or dtypes do not fit `w`.
        """
        self.check(w)
        if self.groups is None:
            m = dropped_linear(self.z, self.up, 0.0, False, w.dtype)
        else:
            with without_autocast(w.device):
                m = grouped_product(self.z, self.up.mT, self.groups)
        return m if self.gain is None else torch.addcmul(m, w, at_rows(self.gain, self.groups))

    def check(self, w: Tensor) -> None:
        """An error if they do not fit `w`."""
        # Addition would broadcast what is too small, to all positions or channels alike.
        rank, channels = self.z.shape[-1], w.shape[-1]
        each = () if self.groups is None else self.groups.ends.shape
        up, gain = (*each, channels, rank), (*each, channels)
        wanted = (("z", (*w.shape[:-1], rank)), ("up", up), ("gain", gain))
        for name, shape in wanted:
            part = getattr(self, name)
            if part is not None and (part.shape != shape or part.dtype != w.dtype):
                raise TokenGateError(
                    f"{name} of the factors has shape {tuple(part.shape)} and dtype {part.dtype}: "
                    f"return {shape} in {w.dtype}, as w has it."
                )


def at_rows(values: Tensor, groups: Groups | None) -> Tensor:
    """What each position is given: the same, `(C,)`, or with groups its layer's, `(N, C)`."""
    return values if groups is None else groups.spread(values)
