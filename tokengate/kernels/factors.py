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
from torch.nn import functional as F

from tokengate.errors import TokenGateError
from tokengate.kernels.precision import without_autocast

# What is called in backward with z and its gradient, `(..., rank)` both; of M(x) without factors
# with that, `(..., out_features)`.
Learn: TypeAlias = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Factors:
    """M(x_i) = up z_i + gain * w_i, in the dtype of `w`.

    Attributes:
        z: the inputs in the low-rank space, `(..., rank)`.
        up: `(out_features, rank)`.
        gain: `(out_features,)`, or None for 0.
    """

    z: Tensor
    up: Tensor
    gain: Tensor | None = None

    def product(self, w: Tensor) -> Tensor:
        """M(x), multiplied out: `(..., out_features) -> (..., out_features)`.

        Raises:
            TokenGateError: shapes or dtypes do not fit `w`.
        """
        self.check(w)
        with without_autocast(w.device):
            m = F.linear(self.z, self.up)
        return m if self.gain is None else torch.addcmul(m, w, self.gain)

    def check(self, w: Tensor) -> None:
        """An error if they do not fit `w`."""
        # Addition would broadcast what is too small, to all positions or channels alike.
        rank, channels = self.z.shape[-1], w.shape[-1]
        wanted = (("z", (*w.shape[:-1], rank)), ("up", (channels, rank)), ("gain", (channels,)))
        for name, shape in wanted:
            part = getattr(self, name)
            if part is not None and (part.shape != shape or part.dtype != w.dtype):
                raise TokenGateError(
                    f"{name} of the factors has shape {tuple(part.shape)} and dtype {part.dtype}: "
                    f"return {shape} in {w.dtype}, as w has it."
                )
