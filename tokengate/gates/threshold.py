"""The gate: which positions a modification may touch, and how its threshold tau learns.

Source: "Is It Necessary to Apply Parameter-Efficient Fine-Tuning to All Position Indices?"
(PEFT_S, published as TS-PEFT, arXiv 2511.16147); the equation numbers are its own.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokengate.arguments import finite, non_negative
from tokengate.errors import TokenGateError
from tokengate.gates.base import PenalisedGate
from tokengate.gates.positions import Positions
from tokengate.gates.registry import register_gate
from tokengate.kernels.change import Change
from tokengate.kernels.eager import applied, has_tangent, is_eager, is_exported
from tokengate.kernels.fused import kernels_for
from tokengate.kernels.groups import Groups
from tokengate.kernels.norms import accumulation_dtype
from tokengate.kernels.precision import KeepsFloat32, in_own_dtypes, trainable_dtype
from tokengate.sharding import local_part


def token_gate(
    w: Tensor,
    m: Tensor,
    tau: Tensor | float,
    penalty: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Add the modification `m` to `w` where it is large enough: `(..., C) -> (..., C)`.

    Forward, for every position i (eq. 2 and 4):

        S_i = 0 if ||m_i|| < tau ||w_i|| else 1
        h_i = w_i + S_i m_i

    Backward, with G_i = dL/dh_i:

        dL/dw_i = G_i,    dL/dm_i = S_i G_i
        mu_i = <G_i, m_i>                                                      (eq. 10)
        g = sum_i { 1[1(mu_i >= 0) = S_i] mu_i + S_i penalty }                 (eq. 14, 15, 17)
        tau.grad = -g            so that a descending optimiser performs eq. 16

    The condition is the paper's, multiplied out: where w_i = 0 nothing is divided, tau <= 0
    is always open, and a NaN in `m_i` leaves the gate open, so that a broken modification is
    seen. A closed position's output is `w_i`, bit for bit. Norms, mu and g are computed in
    float32 (float64 if an input is float64); norms neither overflow nor underflow.

    Args:
        w: the frozen layer's output without bias, W0 x, of shape `(..., C)`.
        m: the modification M(x), of the same shape; cast to `w`'s dtype when it is added.
        tau: the threshold on ||m_i|| / ||w_i||: one element, of any shape; or a number.
        penalty: lambda, added to g once per open position.
        mask: of shape `(...)`; a position where it is 0 counts in neither mu nor lambda's sum.
            It never changes the output.

    Raises:
        TokenGateError: shapes or dtypes do not fit, or a number is not finite or negative.
    """
    _check_tensors(w, m, mask)
    if not isinstance(tau, Tensor):
        dtype = accumulation_dtype(w, m)
        tau = torch.full((1,), finite("tau", tau), dtype=dtype, device=w.device)
    elif tau.numel() != 1 or not tau.is_floating_point():
        raise TokenGateError(
            f"tau has shape {tuple(tau.shape)} and dtype {tau.dtype}: pass one floating-point "
            "element, e.g. of shape (1,)."
        )
    change = Change(w, None, m)
    is_open = change.decided(tau, change.dtype)
    a = applied(
        _Threshold, tau, is_open, non_negative("penalty", penalty), mask, change.dtype, None
    )
    return change.add(a)


@register_gate("threshold")
class TokenGate(PenalisedGate):
    """The paper's gate: S_i of eq. 4, with a threshold `tau`, of shape (1,), and `penalty` lambda.

    tau has one dimension because sharded training (FSDP2) refuses parameters without, and
    stays float32 when the model is cast to 16 bits.

    Args:
        tau: initial threshold; at 0 or below every position is open.
        penalty: lambda of eq. 15, >= 0.
        dtype: float32, or float64 for a float64 base.

    Raises:
        TokenGateError: `tau` is not finite, or `penalty` not finite or negative.
    """

    stacks = True
    tau: nn.Parameter
    # 1e-5 is where the paper's search of lambda begins to close gates.
    option_defaults: ClassVar[dict[str, float]] = {"tau": 0.0, "penalty": 1e-5}

    def __init__(
        self,
        tau: float = 0.0,
        penalty: float = 0.0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        KeepsFloat32.__init__(self)
        self._set_up(dtype, device)
        self.penalty = penalty
        self._first = finite("tau", tau)
        self.tau = nn.Parameter(torch.full((1,), self._first, dtype=dtype, device=device))

    @classmethod
    def beside(cls, linear: nn.Linear, **options: Any) -> TokenGate:
        """A gate for a layer."""
        weight = linear.weight
        numbers = {**cls.option_defaults, **options}
        gate = cls(**numbers, dtype=trainable_dtype(weight), device=weight.device)
        # tau is saved as a tensor, and the penalty by itself.
        gate.options = {k: v for k, v in options.items() if k not in ("tau", "penalty")}
        return gate

    def reset_parameters(self) -> None:
        """Give tau the value it had at first."""
        nn.init.constant_(self.tau, self._first)

    @property
    def threshold(self) -> Tensor:
        """tau."""
        return self.tau

    def weights(self, positions: Positions) -> Tensor:
        """a_i = S_i of eq. 4, `(...)`."""
        learns = torch.is_grad_enabled() and self.tau.requires_grad and not is_exported()
        if not learns and not has_tangent(self.tau):
            return positions.decided(self.tau, torch.bool)  # nobody asks for mu
        is_open = positions.decided(self.tau, positions.dtype)
        a: Tensor = applied(
            _Threshold,
            self.tau,
            is_open,
            self.pull(),
            positions.mask,
            positions.dtype,
            positions.groups,
        )
        if is_open.dtype == torch.bool:
            positions.selects(a, is_open)
        return a

    def extra_repr(self) -> str:
        # tau may live on the meta device, where it has no value, or on another rank.
        tau = local_part(self.tau.detach())
        value = ""
        if tau.numel() and not tau.is_meta:  # of several layers, from the least to the largest
            value = "tau=" + "..".join(dict.fromkeys(f"{t:.4g}" for t in tau.aminmax())) + ", "
        return f"{value}penalty={self.penalty:g}"


class _Threshold(torch.autograd.Function):
    """a = S, which is given, as numbers of `dtype`; from mu = dL/da, eq. 14, 15 and 17 for tau."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        tau: Tensor,
        is_open: Tensor,
        penalty: Tensor | float,
        mask: Tensor | None,
        dtype: torch.dtype,
        groups: Groups | None,
    ) -> Tensor:
        return is_open.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tau, _, penalty, mask, _, ctx.groups = inputs
        tensor = penalty if isinstance(penalty, Tensor) else None
        ctx.save_for_backward(output, mask, tensor)  # a, which the sum keeps, too
        ctx.save_for_forward(output)
        ctx.tau_dtype, ctx.tau_shape = tau.dtype, tau.shape
        ctx.penalty = None if tensor is penalty else penalty

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> Tensor:
        warnings.warn(
            "a derivative is taken forward along tau, in which outputs are constant between jumps: "
            "it adds 0, where backward gives tau the paper's eq. 17, which is no derivative; leave "
            "tau out of what is derived.",
            stacklevel=2,
        )
        (a,) = ctx.saved_tensors
        return torch.zeros_like(a)

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, mu: Tensor) -> tuple[Tensor | None, ...]:
        a, mask, penalty = ctx.saved_tensors
        shape, dtype = ctx.tau_shape, ctx.tau_dtype
        kernels = kernels_for(mu, a) if is_eager(mu, a) and ctx.groups is None else None
        if kernels is not None and not torch.is_grad_enabled():
            flat = (mu.reshape(-1), a.reshape(-1), None if mask is None else mask.reshape(-1))
            grad = kernels.direct(*flat, penalty, float(ctx.penalty or 0), dtype)
            return grad.view(shape), *[None] * 5
        penalty = ctx.penalty if penalty is None else penalty
        g = threshold_direction(mu.detach(), a, penalty, mask, ctx.groups)
        return -g.to(dtype).reshape(shape), *[None] * 5


def threshold_direction(
    mu: Tensor,
    is_open: Tensor,
    penalty: Tensor | float,
    mask: Tensor | None,
    groups: Groups | None = None,
) -> Tensor:
    """g of eq. 17, `(...), (...) -> ()`, or with groups of each layer, `(N,), (N,) -> (E,)`.

    S as booleans, or as numbers 0 and 1.
    """
    stays = (mu >= 0) != is_open
    if mask is not None:
        padding = mask == 0
        stays, is_open = stays | padding, is_open.masked_fill(padding, 0)
    mu = mu.masked_fill(stays, 0)
    if groups is None:
        return mu.sum() + penalty * is_open.sum(dtype=mu.dtype)
    return groups.sums(mu) + penalty * groups.sums(is_open.to(mu.dtype))


def _check_tensors(w: Tensor, m: Tensor, mask: Tensor | None) -> None:
    for name, value in (("w", w), ("m", m), ("mask", mask)):
        if not isinstance(value, Tensor) and not (name == "mask" and value is None):
            raise TokenGateError(f"{name} is a {type(value).__name__}: pass a tensor.")
    if w.shape != m.shape or w.dim() == 0:
        raise TokenGateError(
            f"w has shape {tuple(w.shape)} and m {tuple(m.shape)}: pass both as (..., channels)."
        )
    if not (w.is_floating_point() and m.is_floating_point()):
        raise TokenGateError(
            f"w has dtype {w.dtype} and m {m.dtype}: pass both as floating-point tensors."
        )
    if mask is not None and mask.shape != w.shape[:-1]:
        raise TokenGateError(
            f"mask has shape {tuple(mask.shape)} for positions of shape {tuple(w.shape[:-1])}: "
            "pass one entry per position."
        )
