"""`gated_sum` by kernels: out + a M(x) of a factored M(x), and its gradients, in a few launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengate.kernels.factors import Factors, Learn
from tokengate.kernels.fused import kernels_for
from tokengate.kernels.gated_sum import GatedSum, gradient_of_up
from tokengate.kernels.norms import Norms
from tokengate.kernels.precision import in_own_dtypes


class Sizes:
    """||m_i|| and ||w_i|| of one call, measured in one launch.

    Args:
        out: `(..., C)`.
        bias: `(C,)`, or None; w is `out` without it.
        m: M(x), `(..., C)`, or in factors.
    """

    def __init__(self, out: Tensor, bias: Tensor | None, m: Tensor | Factors) -> None:
        self._kernels = kernels_for(out)
        self._shape = out.shape[:-1]
        parts = (None, m.z, m.up, m.gain) if isinstance(m, Factors) else (m, None, None, None)
        self._sums: Tensor = self._kernels.measure(out, bias, *parts)

    def norms(self) -> tuple[Norms, Norms]:
        """Both as n p, `(...)`, p powers of two."""
        norms, powers = self._kernels.finish(self._sums)
        of_m, of_w = norms.view(2, *self._shape)
        m_power, w_power = powers.view(2, *self._shape)
        return (of_m, m_power), (of_w, w_power)

    def opened(self, tau: Tensor, dtype: torch.dtype) -> Tensor:
        """S of eq. 4, `(...)`, in `dtype`; tau is one element on the same device."""
        is_open: Tensor = self._kernels.decide(self._sums, tau, dtype)
        return is_open.view(self._shape)


class FusedSum(GatedSum):
    """The same as `GatedSum`, of which a closed position keeps its -0.0, too."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        bias: Tensor | None,
        z: Tensor,
        up: Tensor,
        gain: Tensor | None,
        a: Tensor | None,
        product: Tensor | None,
        in_place: bool,
        is_open: Tensor | None,
        learn: Learn | None,
    ) -> Tensor:
        h = fused_sum(out, bias, z, up, gain, a, in_place)
        if in_place:
            ctx.mark_dirty(out)
        kept = (None, None) if gain is None else (out, bias)
        ctx.save_for_backward(*kept, z, up, gain, a)
        ctx.selects, ctx.learn = False, learn
        return h

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, bias, z, up, gain, a = ctx.saved_tensors
        kernels = kernels_for(grad)
        if torch.is_grad_enabled() or kernels is None:  # a gradient that has gradients
            gradients: tuple[Tensor | None, ...] = GatedSum.backward(ctx, grad)
            return gradients
        _, needs_bias, needs_z, needs_up, _, needs_a, *_ = ctx.needs_input_grad
        rows, flat_z = grad.reshape(-1, grad.shape[-1]), z.reshape(-1, z.shape[-1])
        flat = None if a is None else a.reshape(-1)
        down = rows @ up
        if ctx.learn is not None:
            ctx.learn(z, down.view(z.shape))
        grad_out, grad_bias, grad_gain, mu_of_w = grad, None, None, None
        if gain is not None:
            passed, mu_of_w, sums = kernels.pass_gain(rows, out, bias, gain, flat, needs_a)
            grad_gain = sums.sum(0).to(gain.dtype)
            if needs_bias:
                grad_bias = (rows - passed).sum(0).to(bias.dtype)
            grad_out = passed.view(grad.shape)
        mu: Tensor = down
        weighted, grad_z = flat_z, down
        if a is not None:
            mu, weighted, grad_z = kernels.weigh(
                flat_z, down, flat, mu_of_w if needs_a else None, needs_a, needs_up, needs_z
            )
        return (
            grad_out,
            grad_bias,
            grad_z.view(z.shape) if needs_z else None,
            gradient_of_up(weighted, rows) if needs_up else None,
            grad_gain,
            mu.view(a.shape) if needs_a else None,
            *[None] * 4,
        )


def fused_sum(
    out: Tensor,
    bias: Tensor | None,
    z: Tensor,
    up: Tensor,
    gain: Tensor | None,
    a: Tensor | None,
    in_place: bool,
) -> Tensor:
    """What `FusedSum` gives, without its gradients."""
    kernels = kernels_for(out)
    flat = None if a is None else a.reshape(-1)
    z = z.reshape(-1, z.shape[-1])
    if in_place:
        kernels.gated_sum_(out, bias, z, up, gain, flat)
        return out
    h: Tensor = kernels.gated_sum(out, bias, z, up, gain, flat)
    return h
