"""out + a M(x) in terms that a compiler can fuse, and `torch.func` transform and derive twice.

`gated_sum` has the same as one operation after another, which is what runs in eager mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengate.kernels.factors import Learn, at_rows
from tokengate.kernels.gated_sum import without_bias
from tokengate.kernels.groups import Groups, grouped_outer, grouped_product
from tokengate.kernels.norms import accumulation_dtype
from tokengate.kernels.precision import in_own_dtypes


class WholeSum(torch.autograd.Function):
    """h = out + a m: `(..., C), (..., C), (...) -> (..., C)`; where a_i = 0, `out` bit for bit.

    Backward, with G_i = dL/dh_i: dL/dout_i = G_i, dL/dm_i = a_i G_i, dL/da_i = <G_i, m_i> (mu_i of
    eq. 10) at every position, for which `m` is kept.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, m: Tensor, a: Tensor, learn: Learn | None) -> Tensor:
        return _selected_sum(out, m, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, m, a, ctx.learn = inputs
        # mu needs m at closed positions too: that is how a closed gate reopens.
        asked = ctx.needs_input_grad[2] or ctx.learn is not None
        ctx.save_for_backward(m if asked else None, a)
        ctx.save_for_forward(m, a)
        ctx.m_dtype = m.dtype

    @staticmethod
    def tangent(
        ctx: Any, out: Tensor | None, m: Tensor | None, a: Tensor | None, learn: None = None
    ) -> Tensor:
        at_m, at_a = ctx.saved_tensors
        return _tangent(at_m, at_a, out, m, a)

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        m, a = ctx.saved_tensors
        grad_m = grad_a = None
        if ctx.learn is not None:
            ctx.learn(m, grad)
        if ctx.needs_input_grad[1]:
            grad_m = _passed_on(grad, a).to(ctx.m_dtype)
        if ctx.needs_input_grad[2]:
            dtype = accumulation_dtype(grad, m)
            grad_a = (grad.to(dtype) * m.to(dtype)).sum(-1)
        return grad, grad_m, grad_a, None


class FactoredSum(torch.autograd.Function):
    """h = out + a (up z + gain w), w = out - bias: `WholeSum` without m among what is kept.

    `m` is M(x) multiplied out, which gets no gradient: its factors do. With groups, `up` and `gain`
    are those of several layers, `(E, C, rank)` and `(E, C)`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        out: Tensor,
        m: Tensor,
        bias: Tensor | None,
        z: Tensor,
        up: Tensor,
        gain: Tensor | None,
        a: Tensor,
        learn: Learn | None,
        groups: Groups | None,
    ) -> Tensor:
        return _selected_sum(out, m, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        out, _, bias, z, up, gain, a, ctx.learn, ctx.groups = inputs
        if gain is None:
            out = bias = None
        # Inputs only, so that a second derivative sees what the first one depends on.
        ctx.save_for_backward(out, bias, z, up, gain, a)
        ctx.save_for_forward(out, bias, z, up, gain, a)

    @staticmethod
    def tangent(
        ctx: Any,
        out: Tensor | None,
        m: Tensor | None,
        bias: Tensor | None,
        z: Tensor | None,
        up: Tensor | None,
        gain: Tensor | None,
        a: Tensor | None,
        *_: None,
    ) -> Tensor:
        at_out, at_bias, at_z, at_up, at_gain, at_a = ctx.saved_tensors
        groups = ctx.groups
        at_m, m = _times(at_z, at_up.mT, groups), None
        if z is not None:
            m = _plus(m, _times(z, at_up.mT, groups))
        if up is not None:
            m = _plus(m, _times(at_z, up.mT, groups))
        if at_gain is not None:
            w, at_gain = without_bias(at_out, at_bias), at_rows(at_gain, groups)
            at_m = at_m + at_gain * w
            if gain is not None:
                m = _plus(m, at_rows(gain, groups) * w)
            if out is not None:
                m = _plus(m, at_gain * out)
            if bias is not None:
                m = _plus(m, -at_gain * bias.to(at_gain.dtype))
        return _tangent(at_m, at_a, out, m, a)

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, bias, z, up, gain, a = ctx.saved_tensors
        _, _, needs_bias, needs_z, needs_up, needs_gain, needs_a, *_ = ctx.needs_input_grad
        groups: Groups | None = ctx.groups
        grad_out, grad_bias, grad_z, grad_up, grad_gain, grad_a = grad, *[None] * 5
        passed = _passed_on(grad, a)
        dtype = accumulation_dtype(grad, z)
        if needs_up:
            grad_up = _outer(passed, z, groups)
        down = _times(grad, up, groups)
        if ctx.learn is not None:
            ctx.learn(z, down)
        if needs_z:
            grad_z = _passed_on(down, a)
        if needs_a:
            # At closed positions too: that is how a closed gate reopens.
            grad_a = (down.to(dtype) * z.to(dtype)).sum(-1)
        if gain is not None:
            w = without_bias(out, bias).to(dtype)
            if needs_gain:
                grad_gain = _summed(passed.to(dtype) * w, groups).to(gain.dtype)
            gain = at_rows(gain, groups)
            if needs_a:
                assert grad_a is not None
                grad_a = grad_a + (grad.to(dtype) * gain.to(dtype) * w).sum(-1)
            through_w = passed * gain
            grad_out = grad + through_w
            if needs_bias:
                grad_bias = -_summed(through_w, None).to(bias.dtype)
        return grad_out, None, grad_bias, grad_z, grad_up, grad_gain, grad_a, None, None


def _times(rows: Tensor, right: Tensor, groups: Groups | None) -> Tensor:
    return rows @ right if groups is None else grouped_product(rows, right, groups)


def _outer(left: Tensor, right: Tensor, groups: Groups | None) -> Tensor:
    if groups is not None:
        return grouped_outer(left, right, groups)
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def _summed(rows: Tensor, groups: Groups | None) -> Tensor:
    """`(..., C) -> (C,)`, or with groups `(N, C) -> (E, C)`."""
    return rows.reshape(-1, rows.shape[-1]).sum(0) if groups is None else groups.sums(rows)


def _selected_sum(out: Tensor, m: Tensor, a: Tensor) -> Tensor:
    # A selection, not only a product: out + 0 m would turn -0.0 into 0.0, and know no infinite m.
    a = a.unsqueeze(-1)
    if a.dtype == torch.bool:
        return torch.where(a, out + m.to(out.dtype), out)
    return torch.where(a != 0, out + (a.to(m.dtype) * m).to(out.dtype), out)


def _passed_on(grad: Tensor, a: Tensor) -> Tensor:
    # A selection again: a closed position passes 0 on even where grad is inf or NaN.
    a = a.unsqueeze(-1)
    if a.dtype == torch.bool:
        return torch.where(a, grad, torch.zeros_like(grad))
    kept = a != 0
    if torch.is_grad_enabled():  # what has a derivative to a, which is `grad` where that is finite
        kept = kept | grad.isfinite()
    return torch.where(kept, a.to(grad.dtype) * grad, torch.zeros_like(grad))


def _tangent(
    at_m: Tensor, at_a: Tensor, out: Tensor | None, m: Tensor | None, a: Tensor | None
) -> Tensor:
    """dout + a dm + da m, `(..., C)`, from the tangents, of which those that are 0 are None."""
    tangent = torch.zeros_like(at_m) if out is None else out
    if m is not None:
        tangent = tangent + _passed_on(m, at_a).to(tangent.dtype)
    if a is not None:
        tangent = tangent + (a.unsqueeze(-1).to(at_m.dtype) * at_m).to(tangent.dtype)
    return tangent


def _plus(sum: Tensor | None, term: Tensor) -> Tensor:
    return term if sum is None else sum + term
