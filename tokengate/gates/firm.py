"""The threshold made continuous: what is just above it is added in part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokengate.arguments import finite
from tokengate.errors import TokenGateError
from tokengate.gates.base import LedGate
from tokengate.gates.positions import Positions
from tokengate.gates.registry import register_gate
from tokengate.kernels.norms import ratios, times


@register_gate("firm")
class FirmGate(LedGate):
    """a_i = clamp(k / (k - 1) (1 - tau / r_i), 0, 1): 0 below tau, 1 from k tau on.

    Between, a_i m_i is what "firm" thresholding makes of m_i: it has no jump, so that autograd
    carries mu_i on to M(x) through a_i as through m_i; nothing flows to closed positions. ||w_i||
    is a constant in backward, for which the layer's output would have to be kept.

    Source: Gao and Bruce, WaveShrink with firm shrinkage, 1997, with the upper threshold k times
    the lower one. Not of the gate's paper.

    tau is 0 at first, and every position open.

    Args:
        linear: the layer that is gated.
        k: from which multiple of tau on a position is open wholly, > 1.

    Raises:
        TokenGateError: `k` is not above 1.
    """

    tau: Tensor

    def __init__(self, linear: nn.Linear, *, k: float = 2.0) -> None:
        super().__init__(linear)
        self.k = finite("k", k)
        if self.k <= 1:
            raise TokenGateError(f"k={k} is not above 1: pass e.g. k=2.")
        self.new_threshold("tau")

    @property
    def threshold(self) -> Tensor:
        """tau."""
        return self.tau

    def weights(self, positions: Positions) -> Tensor:
        """a, `(...)`."""
        r = ratios((positions.m_norm, 1.0), (times(*positions.norms[1]), 1.0))
        tau = self.tau.to(r.dtype)
        closed = r < tau
        # Where nothing is closed, or all, tau / r may be no number: neither has a gradient.
        within = ~closed & (r > 0)
        share = self.k / (self.k - 1) * (1 - tau / torch.where(within, r, 1))
        return torch.where(closed, 0, share.clamp(max=1))
