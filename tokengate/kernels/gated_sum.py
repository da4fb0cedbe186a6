"""out + S M(x) of a factored M(x) as a CPU or GPU computes it fastest, one operation after another.

`factors` has the same in terms that a compiler can fuse and `torch.func` transform. Here the gate
acts on z, which is as wide as the rank: of M(x) alone there is no copy, and its norm is that of
z under `up' up`. Where M(x) has a gain, it is as wide as the output; it is then made and used up
a few rows at a time, while a processor's cache holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokengate.gates.threshold import TokenGate, opened, threshold_direction
from tokengate.kernels.norms import Norms, accumulation_dtype, norms

# Elements of the rows that are worked on at a time: half a megabyte to a megabyte.
_BLOCK = 2**18


class GatedSum(torch.autograd.Function):
    """h = out + S (up z + gain w), w = out - bias, and S; forward and backward as `TokenGate`'s.

    `(..., out_features) -> (..., out_features), (...)`. Without a gate, S is None and counts as 1
    everywhere. Kept for backward are z, `up`, S and, with a gain, `out`. Unlike `TokenGate`'s, its
    backward multiplies a closed position by 0: a gradient that is infinite there reaches `up`, too.
    And its forward may give a closed position 0.0 where it had -0.0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        bias: Tensor | None,
        z: Tensor,
        up: Tensor,
        gain: Tensor | None,
        tau: Tensor | None,
        gate: TokenGate | None,
        mask: Tensor | None,
        in_place: bool,
    ) -> tuple[Tensor, Tensor | None]:
        h, is_open = gated_sum(out, bias, z, up, gain, gate, in_place)
        if in_place:
            ctx.mark_dirty(out)
        pull: Tensor | float = 0.0
        if gate is not None and tau is not None and is_open is not None:
            ctx.mark_non_differentiable(is_open)
            ctx.tau_dtype, ctx.tau_shape, pull = tau.dtype, tau.shape, gate.pull()
        ctx.penalty = None if isinstance(pull, Tensor) else pull
        kept = (None, None) if gain is None else (out, bias)
        tensor = pull if isinstance(pull, Tensor) else None
        ctx.save_for_backward(*kept, z, up, gain, is_open, mask, tensor)
        return h, is_open

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        out, bias, z, up, gain, is_open, mask, pull = ctx.saved_tensors
        _, needs_bias, needs_z, needs_up, _, needs_tau, *_ = ctx.needs_input_grad
        grad_out, grad_bias, grad_z, grad_up, grad_gain, grad_tau = grad, *[None] * 5
        rows = grad.reshape(-1, grad.shape[-1])
        down = (rows @ up).view(z.shape)
        if needs_up:
            # 16-bit products are quicker this way round, wider ones the other.
            kept_z = _where(is_open, z).reshape(-1, z.shape[-1])
            narrow = grad.element_size() < 4
            grad_up = (kept_z.T @ rows).T if narrow else rows.T @ kept_z
        if needs_z:
            grad_z = _where(is_open, down)
        if needs_tau:
            # At closed positions too: that is how a closed gate reopens.
            dtype = accumulation_dtype(grad, z)
            # No vecdot: where backward runs within autocast, that would sum in 16 bits.
            mu = (down.detach().to(dtype) * z.detach().to(dtype)).sum(-1)
        if gain is not None:
            in_blocks = not torch.is_grad_enabled()  # with gradients of its own, in one
            grad_out, mu_of_w, grad_gain = _through_gain(
                rows, out.reshape(rows.shape), bias, gain, is_open, in_blocks
            )
            if needs_bias:
                grad_bias = -(grad_out - rows).sum(0).to(bias.dtype)
            grad_out = grad_out.view(grad.shape)
            if needs_tau:
                mu = mu + mu_of_w.detach().view(mu.shape)
        if needs_tau:
            g = threshold_direction(mu, is_open, ctx.penalty if pull is None else pull, mask)
            grad_tau = -g.to(ctx.tau_dtype).reshape(ctx.tau_shape)
        return grad_out, grad_bias, grad_z, grad_up, grad_gain, grad_tau, None, None, None


def gated_sum(
    out: Tensor,
    bias: Tensor | None,
    z: Tensor,
    up: Tensor,
    gain: Tensor | None,
    gate: TokenGate | None,
    in_place: bool,
) -> tuple[Tensor, Tensor | None]:
    """What `GatedSum` gives, without its gradients."""
    width = out.shape[-1]
    z = z.reshape(-1, z.shape[-1])
    # What is returned is no view, or the caller might not write over it.
    if gain is None:
        h = out if in_place else out.clone(memory_format=torch.contiguous_format)
        is_open = _add_low_rank(h.view(-1, width), z, bias, up, gate)
    else:
        h = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        rows = h.view(-1, width), out.reshape(-1, width)
        is_open = _add_with_gain(*rows, z, bias, up, gain, gate)
    return h, None if is_open is None else is_open.view(out.shape[:-1])


def without_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """w = W0 x from a linear layer's output: `(..., out_features) -> (..., out_features)`."""
    return out if bias is None else out - bias.to(out.dtype)


def _add_low_rank(
    h: Tensor, z: Tensor, bias: Tensor | None, up: Tensor, gate: TokenGate | None
) -> Tensor | None:
    """Add S up z to the layer's output in `h`; S."""
    is_open = None
    if gate is not None:
        is_open = gate.decide(_norms_of_product(z, up), _norms_without_bias(h, bias))
    h.addmm_(_where(is_open, z), up.T)
    return is_open


def _add_with_gain(
    h: Tensor,
    out: Tensor,
    z: Tensor,
    bias: Tensor | None,
    up: Tensor,
    gain: Tensor,
    gate: TokenGate | None,
) -> Tensor | None:
    """Write `out` + S (up z + gain w) to `h`, which is not `out`; S."""
    opens, of_m, of_w = [], [], []
    dtype = accumulation_dtype(out)
    for block in _blocks(out):
        w = without_bias(out[block], bias)
        m = (w * gain).addmm_(z[block], up.T)
        if gate is None:
            torch.add(out[block], m, out=h[block])
            continue
        of_m.append(norms(m, dtype))
        of_w.append(norms(w, dtype))
        is_open = opened(of_m[-1], of_w[-1], gate.tau)
        # A closed position's M(x) is finite, or its gate would be open.
        torch.addcmul(out[block], m, is_open.unsqueeze(-1).to(m.dtype), out=h[block])
        opens.append(is_open)
    if gate is None:
        return None
    if gate.measures:
        gate.decide(_joined(of_m), _joined(of_w))
    return opens[0] if len(opens) == 1 else torch.cat(opens)


def _through_gain(
    grad: Tensor,
    out: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    is_open: Tensor | None,
    in_blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `out`, `(N, C)`, and of `gain`, `(C,)`; between them <gain * G_i, w_i>."""
    dtype = accumulation_dtype(grad)
    wide = gain.to(dtype)
    at = grad.new_ones(len(grad), dtype=dtype) if is_open is None else is_open.flatten().to(dtype)
    passed = torch.empty_like(grad) if in_blocks else None
    through: list[Tensor] = []
    mu: list[Tensor] = []
    grad_gain = torch.zeros_like(wide)
    for block in _blocks(grad) if in_blocks else [slice(None)]:
        products = grad[block].to(dtype) * without_bias(out[block], bias).to(dtype)
        mu.append(products @ wide)
        grad_gain = grad_gain + at[block] @ products
        part = grad[block]
        if is_open is not None:
            part = part * at[block].unsqueeze(-1).to(grad.dtype)
        if passed is None:
            through.append(torch.addcmul(grad[block], part, gain))
        else:
            torch.addcmul(grad[block], part, gain, out=passed[block])
    return (
        torch.cat(through) if passed is None else passed,
        torch.cat(mu),
        grad_gain.to(gain.dtype),
    )


def _norms_without_bias(out: Tensor, bias: Tensor | None) -> Norms:
    """||w_i||: `(N, C) -> (N,), (N,)`."""
    dtype = accumulation_dtype(out)
    if bias is None:
        return norms(out, dtype)
    return _joined([norms(without_bias(out[block], bias), dtype) for block in _blocks(out)])


def _norms_of_product(z: Tensor, up: Tensor) -> Norms:
    """||up z_i|| from the r x r products of up's columns: `(N, r), (C, r) -> (N,), (N,)`.

    Of few positions M(x) itself, which is less work.
    """
    if len(z) <= up.shape[1]:
        return norms(z @ up.T, accumulation_dtype(z))
    if z.device.type == "cpu" and z.dtype != torch.float64:
        square, bound = _from_gram(z, up, torch.float32)
        least, largest = bound.aminmax()  # both are NaN where one of them is
        # Else squares may have left float32's range, or what is left of their differences is
        # rounding.
        in_range = least.item() > 1e-30 and largest.item() < 1e30
        if in_range and (square / bound).amin().item() > 1e-3:
            return square.sqrt_(), 0
    wide = torch.float32 if z.device.type == "mps" else torch.float64  # which mps has not
    square, _ = _from_gram(z, up, wide)
    return square.clamp_(min=0).sqrt_(), 0  # a NaN stays one


def _from_gram(z: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """||up z_i||^2, and the largest that it can be: ||up||^2 ||z_i||^2, `(N,), (N,)`."""
    z, up = z.to(dtype), up.to(dtype)
    gram = up.T @ up
    return torch.linalg.vecdot(z @ gram, z), gram.trace() * torch.linalg.vecdot(z, z)


def _joined(parts: list[Norms]) -> Norms:
    if len(parts) == 1:
        return parts[0]
    exponent: Tensor | int = 0
    if any(isinstance(e, Tensor) for _, e in parts):
        exponent = torch.cat([n.new_zeros(len(n), dtype=torch.int32) + e for n, e in parts])
    return torch.cat([n for n, _ in parts]), exponent


def _where(is_open: Tensor | None, x: Tensor) -> Tensor:
    if is_open is None:
        return x
    # A selection: what is closed is 0, whatever it was.
    return torch.where(is_open.unsqueeze(-1), x, 0)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Of `(N, C)`: as many rows at a time as a cache holds; on a GPU all of them."""
    size = max(1, len(rows))
    if rows.device.type == "cpu":
        size = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), size) if len(rows) else [0]:
        yield slice(start, start + size)
