"""A modification in factored form, and the gate that never keeps it multiplied out.

M(x_i) of every low-rank method is `up z_i`, with z_i in R^r, plus for DoRA `gain * w_i`. What its
gate learns from, mu_i = <G_i, m_i> (eq. 10), is then <up' G_i, z_i> + <gain * G_i, w_i>: backward
needs z and `up`, not M(x) itself, which is as large as the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokengate.errors import TokenGateError
from tokengate.gates.threshold import TokenGate, threshold_direction
from tokengate.kernels.eager import is_eager, is_watched
from tokengate.kernels.gated_sum import GatedSum, gated_sum, without_bias
from tokengate.kernels.norms import accumulation_dtype
from tokengate.kernels.precision import without_autocast


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
        self._check(w)
        with without_autocast(w.device):
            m = F.linear(self.z, self.up)
        return m if self.gain is None else torch.addcmul(m, w, self.gain)

    def _check(self, w: Tensor) -> None:
        # Addition would broadcast what is too small, to all positions or channels alike.
        rank, channels = self.z.shape[-1], w.shape[-1]
        wanted = {"z": (*w.shape[:-1], rank), "up": (channels, rank), "gain": (channels,)}
        for name, shape in wanted.items():
            part = getattr(self, name)
            if part is not None and (tuple(part.shape) != shape or part.dtype != w.dtype):
                raise TokenGateError(
                    f"{name} of the factors has shape {tuple(part.shape)} and dtype {part.dtype}: "
                    f"return {shape} in {w.dtype}, as w has it."
                )

    def add_to(
        self,
        out: Tensor,
        bias: Tensor | None,
        gate: TokenGate | None,
        mask: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`out` with M(x) added where `gate` is open, `(..., out_features)`; and S, `(...)`.

        Forward and backward are those of `TokenGate`, with w = `out` - `bias`. Kept for backward
        are z, `up`, S and, with a gain, `out`.

        Args:
            out: the layer's output, `(..., out_features)`.
            bias: `(out_features,)`, or None.
            gate: decides; its tau gets the gradient of eq. 14, 15 and 17. None: M(x) is added at
                every position, and S is None.
            mask: `(...)`; where it is 0, a position does not count.
            in_place: `out` is nobody else's and may be written over.
        """
        if is_eager(out, self.z, self.up):
            self._check(out)
            in_place = in_place and self.gain is None and _may_be_written(out)
            tau = None if gate is None else gate.tau
            with without_autocast(out.device):
                if not torch.is_grad_enabled():
                    factors = (self.z, self.up, self.gain)
                    return gated_sum(out, bias, *factors, gate, in_place)
                summed: tuple[Tensor, Tensor | None] = GatedSum.apply(
                    out, bias, self.z, self.up, self.gain, tau, gate, mask, in_place
                )
            return summed
        w = without_bias(out, bias)
        if gate is None:
            return out + self.product(w), None
        with torch.no_grad():
            m = self.product(w)
        is_open = gate.open_positions(w, m)
        factors = (self.z, self.up, self.gain)
        h: Tensor = _FactoredGate.apply(
            out, m, bias, *factors, gate.tau, is_open, gate.pull(), mask
        )
        return h, is_open


def _may_be_written(out: Tensor) -> bool:
    # Through a view autograd would copy.
    return out.is_contiguous() and out._base is None and not is_watched()


class _FactoredGate(torch.autograd.Function):
    """h = out + S (up z + gain w), w = out - bias: `gate._Gate` without m among what is saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        out: Tensor,
        m: Tensor,
        bias: Tensor | None,
        z: Tensor,
        up: Tensor,
        gain: Tensor | None,
        tau: Tensor,
        is_open: Tensor,
        penalty: Tensor | float,
        mask: Tensor | None,
    ) -> Tensor:
        return torch.where(is_open.unsqueeze(-1), out + m, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        out, _, bias, z, up, gain, tau, is_open, penalty, mask = inputs
        if gain is None:
            out = bias = None
        # Inputs only, so that a second derivative sees what the first one depends on.
        tensor = penalty if isinstance(penalty, Tensor) else None
        ctx.save_for_backward(out, bias, z, up, gain, is_open, mask, tensor)
        ctx.tau_dtype, ctx.tau_shape = tau.dtype, tau.shape
        ctx.penalty = None if tensor is penalty else penalty

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, bias, z, up, gain, is_open, mask, penalty = ctx.saved_tensors
        _, _, needs_bias, needs_z, needs_up, needs_gain, needs_tau, *_ = ctx.needs_input_grad
        grad_out, grad_bias, grad_z, grad_up, grad_gain, grad_tau = grad, *[None] * 5
        # A selection, not a product: a closed position passes 0 on even where grad is inf or NaN.
        opened = torch.where(is_open.unsqueeze(-1), grad, torch.zeros_like(grad))
        dtype = accumulation_dtype(grad, z)
        if needs_up:
            grad_up = opened.reshape(-1, up.shape[0]).T @ z.reshape(-1, up.shape[1])
        down = grad @ up
        if needs_z:
            grad_z = torch.where(is_open.unsqueeze(-1), down, torch.zeros_like(down))
        if needs_tau:
            # At closed positions too: that is how a closed gate reopens.
            mu = (down.detach().to(dtype) * z.to(dtype)).sum(-1)
        if gain is not None:
            w = without_bias(out, bias).to(dtype)
            if needs_gain:
                products = (opened.to(dtype) * w).reshape(-1, up.shape[0])
                grad_gain = products.sum(0).to(gain.dtype)
            if needs_tau:
                mu = mu + (grad.detach().to(dtype) * gain.to(dtype) * w).sum(-1)
            through_w = opened * gain
            grad_out = grad + through_w
            if needs_bias:
                grad_bias = -through_w.reshape(-1, up.shape[0]).sum(0).to(bias.dtype)
        if needs_tau:
            penalty = ctx.penalty if penalty is None else penalty
            g = threshold_direction(mu.detach(), is_open, penalty, mask)
            grad_tau = -g.to(ctx.tau_dtype).reshape(ctx.tau_shape)
        return grad_out, None, grad_bias, grad_z, grad_up, grad_gain, grad_tau, None, None, None
