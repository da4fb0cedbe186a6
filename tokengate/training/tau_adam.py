"""Adam on tau, exactly as the paper writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from tokengate.arguments import betas as check_betas
from tokengate.arguments import non_negative, positive


class TauAdam(Optimizer):
    """Eq. 18-22, with g_k = -tau.grad:

        m_k = beta1 m_{k-1} + (1 - beta1) g_k
        v_k = beta2 v_{k-1} + (1 - beta2) g_k^2
        tau <- tau + alpha s (m_k / (1 - beta1^k)) / (sqrt(v_k / (1 - beta2^k)) + eps)

    The same numbers come from `torch.optim.Adam` with learning rate alpha * s, which is how
    `param_groups` puts the taus into the optimiser of everything else. Use this class where tau
    is to have an optimiser of its own.

    Args:
        params: the taus, `[layer.gate.tau for layer in tokengate.layers(model).values()]`, or
            parameter groups.
        s: slope of the approximated step (eq. 11); the farthest tau moves in one step.
        alpha: learning rate. It is each group's `"lr"`, so that schedulers find it.
        betas: decay rates of m and v; the paper uses (0.9, 0.98).
        eps: keeps the division from 0 / 0.

    Raises:
        TokenGateError: a number is out of its range.
    """

    def __init__(
        self,
        params: Any,
        s: float = 4e-5,
        alpha: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": alpha, "s": s, "betas": check_betas(betas), "eps": eps}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may bring its own `lr` (alpha), `s`, `betas` and `eps`."""
        group = {**self.defaults, **param_group}
        non_negative("alpha", group["lr"])
        non_negative("s", group["s"])
        rates = check_betas(group["betas"])
        positive("eps", group["eps"])
        super().add_param_group({**param_group, "betas": rates})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform eq. 18-22 for every tau that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for tau in group["params"]:
                if tau.grad is None:
                    continue
                state = self.state[tau]
                if not state:
                    state["step"] = 0
                    state["m"] = torch.zeros_like(tau)
                    state["v"] = torch.zeros_like(tau)
                g = -tau.grad
                state["step"] += 1
                m = state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
                v = state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                m_hat = m / (1 - beta1 ** state["step"])
                v_hat = v / (1 - beta2 ** state["step"])
                tau.addcdiv_(
                    m_hat, v_hat.sqrt_().add_(group["eps"]), value=group["lr"] * group["s"]
                )
        return loss
