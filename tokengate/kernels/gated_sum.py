"""out + a M(x) of a factored M(x) as a CPU or GPU computes it fastest, one operation after another.

`traced_sum` has the same in terms that a compiler can fuse and `torch.func` transform. Here a
weighs z, which is as wide as the rank: of M(x) alone there is no copy, and its norm is that of
z under `up' up`. Where M(x) has a gain, it is as wide as the output; it is then made and measured
a few rows at a time, while a processor's cache holds them, and added once the gate has decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokengate.kernels.factors import Learn
from tokengate.kernels.norms import Norms, accumulation_dtype, norms, reshaped
from tokengate.kernels.precision import in_own_dtypes

# Elements of the rows that are worked on at a time: half a megabyte to a megabyte.
_BLOCK = 2**18


class GatedSum(torch.autograd.Function):
    """h = out + a (up z + gain w), w = out - bias: `(..., out_features) -> (..., out_features)`.

    Forward and backward as `traced_sum.FactoredSum`'s, with a = 1 where it is None, and a selection
    where it is said to be one, `is_open`. Kept for backward are z, `up`, a and, with a gain, `out`.
    Unlike there, backward multiplies a closed position by 0: a gradient that is infinite there
    reaches `up`, too. And without a gain, forward may give a closed position 0.0 where it had -0.0.
    """

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
        selection = a if is_open is None else is_open
        h = gated_sum(out, bias, z, up, gain, selection, product, in_place)
        written = out if in_place else product
        if written is not None:
            ctx.mark_dirty(written)
        kept = (None, None) if gain is None else (out, bias)
        ctx.save_for_backward(*kept, z, up, gain, a)
        ctx.selects, ctx.learn = is_open is not None, learn
        return h

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, bias, z, up, gain, a = ctx.saved_tensors
        _, needs_bias, needs_z, needs_up, _, needs_a, *_ = ctx.needs_input_grad
        grad_out, grad_bias, grad_up, grad_gain, mu = grad, *[None] * 4
        if ctx.selects and not torch.is_grad_enabled():  # else its gradients have one to a
            a = a != 0
        rows = grad.reshape(-1, grad.shape[-1])
        down = (rows @ up).view(z.shape)
        if ctx.learn is not None:
            ctx.learn(z, down)
        weighted_z, grad_z = _weighted(a, z if needs_up else None, down if needs_z else None)
        if weighted_z is not None:
            grad_up = gradient_of_up(weighted_z.reshape(-1, z.shape[-1]), rows)
        if needs_a:
            # At closed positions too: that is how a closed gate reopens.
            dtype = accumulation_dtype(grad, z)
            wide = (down, z) if z.dtype == dtype else (down.to(dtype), z.to(dtype))
            mu = torch.mul(*wide).sum(-1)
        if gain is not None:
            in_blocks = not torch.is_grad_enabled()  # with gradients of its own, in one
            grad_out, mu_of_w, grad_gain = _through_gain(
                rows, out.reshape(rows.shape), bias, gain, a, in_blocks
            )
            if needs_bias:
                grad_bias = -(grad_out - rows).sum(0).to(bias.dtype)
            grad_out = grad_out.view(grad.shape)
            if mu is not None:
                mu = mu + mu_of_w.view(mu.shape)
        return grad_out, grad_bias, grad_z, grad_up, grad_gain, mu, None, None, None, None


def gated_sum(
    out: Tensor,
    bias: Tensor | None,
    z: Tensor,
    up: Tensor,
    gain: Tensor | None,
    a: Tensor | None,
    product: Tensor | None,
    in_place: bool,
) -> Tensor:
    """What `GatedSum` gives, without its gradients.

    `product` is up z + gain w, if that was made before, and becomes the sum.
    """
    width, rank = out.shape[-1], z.shape[-1]
    # What is returned is no view, or the caller might not write over it.
    if gain is None:
        h = out if in_place else out.clone(memory_format=torch.contiguous_format)
        (weighted,) = _weighted(a, z)
        h.view(-1, width).addmm_(weighted.reshape(-1, rank), up.T)
        return h
    z = z.reshape(-1, rank)
    h = torch.empty(out.shape, dtype=out.dtype, device=out.device) if product is None else product
    _add_with_gain(h.view(-1, width), out.reshape(-1, width), z, bias, up, gain, a, product is None)
    return h


def gradient_of_up(weighted_z: Tensor, rows: Tensor) -> Tensor:
    """dL/dup from a z and dL/dh: `(N, rank), (N, C) -> (C, rank)`."""
    # 16-bit products are quicker this way round, wider ones the other.
    return (weighted_z.T @ rows).T if rows.element_size() < 4 else rows.T @ weighted_z


def without_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """w = W0 x from a linear layer's output: `(..., out_features) -> (..., out_features)`."""
    return out if bias is None else out - bias.to(out.dtype)


def product_with_gain(
    out: Tensor, z: Tensor, bias: Tensor | None, up: Tensor, gain: Tensor
) -> tuple[Tensor, Norms, Norms]:
    """m = up z + gain w, `(..., C)`, with its norms and those of w, `(...)`; z is `(..., rank)`."""
    product, at = torch.empty(out.shape, dtype=out.dtype, device=out.device), out.shape[:-1]
    m, out = product.view(-1, out.shape[-1]), out.reshape(-1, out.shape[-1])
    z = z.reshape(-1, z.shape[-1])
    of_m, of_w = [], []
    dtype = accumulation_dtype(out)
    for block in blocks(out):
        w = without_bias(out[block], bias)
        torch.mul(w, gain, out=m[block]).addmm_(z[block], up.T)
        of_m.append(norms(m[block], dtype, True))
        of_w.append(norms(w, dtype, True))
    norms_of_m, norms_of_w = (reshaped(_joined(p), lambda n: n.view(at)) for p in (of_m, of_w))
    return product, norms_of_m, norms_of_w


def _add_with_gain(
    h: Tensor,
    out: Tensor,
    z: Tensor,
    bias: Tensor | None,
    up: Tensor,
    gain: Tensor,
    a: Tensor | None,
    empty: bool,
) -> None:
    """Write `out` + a m to `h`, which is m = up z + gain w, or `empty`."""
    weights = None if a is None else a.reshape(-1, 1)
    for block in blocks(out):
        m = h[block]
        if empty:
            torch.mul(without_bias(out[block], bias), gain, out=m).addmm_(z[block], up.T)
        if weights is None:
            m.add_(out[block])
            continue
        weight = is_open = weights[block]
        if weight.dtype == torch.bool:
            m.add_(out[block])
        else:
            torch.addcmul(out[block], m, weight.to(m.dtype), out=m)
            is_open = weight != 0
        # A selection: what is closed is as it was, whatever M(x) is there.
        torch.where(is_open, m, out[block], out=m)


def _through_gain(
    grad: Tensor,
    out: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    a: Tensor | None,
    in_blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `out`, `(N, C)`, and of `gain`, `(C,)`; between them <gain * G_i, w_i>."""
    dtype = accumulation_dtype(grad)
    wide = gain.to(dtype)
    at = None if a is None else a.flatten().to(dtype)
    passed = torch.empty_like(grad) if in_blocks else None
    through: list[Tensor] = []
    mu: list[Tensor] = []
    grad_gain = torch.zeros_like(wide)
    for block in blocks(grad) if in_blocks else [slice(None)]:
        products = grad[block].to(dtype) * without_bias(out[block], bias).to(dtype)
        mu.append(products @ wide)
        part = grad[block]
        if at is None:
            grad_gain = grad_gain + products.sum(0)
        else:
            grad_gain = grad_gain + at[block] @ products
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


def norms_without_bias(out: Tensor, bias: Tensor | None) -> Norms:
    """||w_i||: `(..., C) -> (...), (...)`."""
    dtype = accumulation_dtype(out)
    if bias is None or out.numel() <= _BLOCK:
        return norms(without_bias(out, bias), dtype, True)
    rows = out.reshape(-1, out.shape[-1])
    parts = [norms(without_bias(rows[block], bias), dtype, True) for block in blocks(rows)]
    return reshaped(_joined(parts), lambda n: n.view(out.shape[:-1]))


def _joined(parts: list[Norms]) -> Norms:
    if len(parts) == 1:
        return parts[0]
    power: Tensor | float = 1.0
    if any(isinstance(p, Tensor) for _, p in parts):
        power = torch.cat([torch.ones_like(n) * p for n, p in parts])
    return torch.cat([n for n, _ in parts]), power


def _weighted(a: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """a_i x_i of each x, `(...), (..., C) -> (..., C)`."""
    if a is None:
        return list(tensors)
    a = a.unsqueeze(-1)
    # A selection: what is closed is 0, whatever it was.
    if a.dtype == torch.bool:
        return [None if x is None else torch.where(a, x, 0) for x in tensors]
    products = [None if x is None else a.to(x.dtype) * x for x in tensors]
    if torch.is_grad_enabled():  # these have a derivative to a, at closed positions too
        return products
    closed = a == 0
    return [None if each is None else each.masked_fill_(closed, 0) for each in products]


def blocks(rows: Tensor) -> Iterator[slice]:
    """Of `(N, C)`: as many rows at a time as a cache holds; on a GPU all of them."""
    size = max(1, len(rows))
    if rows.device.type == "cpu":
        size = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), size) if len(rows) else [0]:
        yield slice(start, start + size)
