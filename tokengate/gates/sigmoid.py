"""A soft gate that reads the input, and an entropy penalty that leads it to 0 or 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokengate.arguments import finite
from tokengate.gates.base import PenalisedGate
from tokengate.gates.positions import Positions
from tokengate.gates.registry import register_gate
from tokengate.kernels.eager import applied
from tokengate.kernels.precision import in_own_dtypes


@register_gate("sigmoid")
class SigmoidGate(PenalisedGate):
    """p_i = sigmoid(v . x_i + c); a_i = p_i in training, 1[p_i >= 1/2] in evaluation.

    Source: GateRA (arXiv 2511.17582), whose entropy penalty is that of each position,
    H(p) = -p log p - (1 - p) log (1 - p): here its gradient, `penalty` dH/dp = `penalty`
    log((1 - p) / p), is added to mu_i at every real position. Deviations: the penalty is summed
    over positions as lambda is (eq. 15), so that micro-batches add up and `scale_penalty` is its
    unit, where GateRA averages; and evaluation is hard, so that positions are closed for good.

    Args:
        linear: the layer that is gated.
        start: c at first; v is 0. With 2, all are open by 0.88.
        penalty: of entropy, for each position.

    Raises:
        TokenGateError: a number is not finite, or `penalty` negative.
    """

    closes_below = 1.0

    def __init__(self, linear: nn.Linear, *, start: float = 2.0, penalty: float = 1e-5) -> None:
        super().__init__(linear)
        self.penalty = penalty
        self.v = self.new_parameter(self.in_features)
        self.c = self.new_parameter(1)
        nn.init.constant_(self.c, finite("start", start))

    def weights(self, positions: Positions) -> Tensor:
        """a, `(...)`."""
        logits = self._logits(positions)
        if not self.training:
            return ~(logits < 0)  # a NaN leaves the gate open, as in eq. 4
        p: Tensor = applied(_Entropy, torch.sigmoid(logits), self.pull(), positions.mask)
        return p

    def scores(self, positions: Positions) -> Tensor:
        """p / (1 - p), `(...)`."""
        with torch.no_grad():
            return self._logits(positions).exp()

    def _logits(self, positions: Positions) -> Tensor:
        x = positions.x
        logits = F.linear(x, self.v.to(x.dtype).unsqueeze(0)).squeeze(-1)
        return logits.to(positions.dtype) + self.c.to(positions.dtype)


class _Entropy(torch.autograd.Function):
    """p, whose gradient is added that of penalty H(p) where `mask` is not 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, penalty: Tensor | float, mask: Tensor | None) -> Tensor:
        return p.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        p, penalty, mask = inputs
        tensor = penalty if isinstance(penalty, Tensor) else None
        ctx.save_for_backward(p, mask, tensor)
        ctx.penalty = None if tensor is penalty else penalty

    @staticmethod
    def tangent(ctx: Any, p: Tensor, *_: Tensor | None) -> Tensor:
        return p.clone()  # the penalty is of the loss, not of p

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, mu: Tensor) -> tuple[Tensor | None, ...]:
        p, mask, penalty = ctx.saved_tensors
        penalty = ctx.penalty if penalty is None else penalty
        # Where p has rounded to 0 or 1 it is led no further.
        slope = torch.where((p > 0) & (p < 1), torch.log1p(-p) - torch.log(p), 0)
        if mask is not None:
            slope = torch.where(mask != 0, slope, 0)
        return mu + penalty * slope, None, None
