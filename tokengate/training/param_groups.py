"""Parameter groups for the user's own optimiser: the taus apart from everything else."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokengate.arguments import betas as check_betas
from tokengate.arguments import count, non_negative, positive
from tokengate.errors import TokenGateError
from tokengate.gates.living import tau_of
from tokengate.layers.patched import require_layers
from tokengate.training.checks.thawed import refuse_thawed

# The paper's s, and how far tau can go in a training, in medians of r: if r grows as the steps do
# to half, and if it is soon as large as it will be to beyond most positions.
_PAPER, _TRAVEL = 4e-5, 2.0


def param_groups(
    model: nn.Module,
    lr: float,
    s: float | None = None,
    *,
    total_steps: int | None = None,
    alpha: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of a patched model, for Adam and AdamW:

        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-4, s=4e-5))

    The first group holds the modifications, what else gates train, and what `patch(train=...)`
    named, the second the taus, with learning rate alpha * s and no weight decay; under Adam and
    AdamW that is eq. 18-22. In s times the number of steps tau can travel at the most, and where
    that is more than the ratios r = ||m_i|| / ||w_i||, it closes everything before M(x) has grown.
    Say `total_steps` instead, and s is a share of what r is, 2 / total_steps: each step of tau is
    multiplied by the median of r in its layer, of that step's positions (and all ranks'). With
    other optimisers, and schedulers that set all groups to one number, see `follow`.

    Args:
        model: a patched model.
        lr: learning rate of the first group.
        s: slope of eq. 11; the farthest tau moves in one step of Adam, at alpha = 1. 4e-5 if
            neither it nor `total_steps` is given.
        total_steps: instead of `s`: optimiser steps of the whole training, see above.
        alpha: learning rate of eq. 22, which multiplies s.
        betas: Adam's decay rates for tau; the paper uses (0.9, 0.98).
        eps: of eq. 22.
        weight_decay: of the first group; None leaves it to the optimiser's default.

    Raises:
        TokenGateError: a number is out of its range, both `s` and `total_steps` are given, the
            weight of a patched layer is trainable, or the model has nothing to train.
    """
    non_negative("lr", lr)
    s = slope(s, total_steps)
    rule = tau_rule(s, alpha, betas, eps)
    gates = [layer.gate for layer in require_layers(model, "param_groups").values()]
    refuse_thawed(model, "param_groups")
    taus = [tau for gate in gates if gate is not None and (tau := tau_of(gate)) is not None]
    is_tau = {id(tau) for tau in taus}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in is_tau]
    first: dict[str, Any] = {"params": others, "lr": lr}
    if weight_decay is not None:
        first["weight_decay"] = non_negative("weight_decay", weight_decay)
    groups = [first]
    if taus:
        groups.append({"params": taus, **rule, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TokenGateError(
            f"no parameter of this {type(model).__name__} is trainable: set requires_grad on the "
            "modifications that are to be trained."
        )
    for gate in gates:
        if gate is not None:
            gate.s, gate._rule = s, rule
            gate.set_pace(relative=total_steps is not None and tau_of(gate) is not None)
    return groups


def tau_rule(s: float, alpha: float, betas: tuple[float, float], eps: float) -> dict[str, Any]:
    """What Adam's group of the taus has under eq. 18-22: `lr`, `betas` and `eps`.

    Raises:
        TokenGateError: a number is out of its range.
    """
    non_negative("alpha", alpha)
    return {
        "lr": non_negative("alpha * s", alpha * s),
        "betas": check_betas(betas),
        "eps": positive("eps", eps),
    }


def slope(s: float | None, total_steps: int | None) -> float:
    """The s that was given, or as a share of r's median that of so many steps."""
    if total_steps is None:
        return _PAPER if s is None else non_negative("s", s)
    if s is not None:
        raise TokenGateError(
            f"s={s} and total_steps={total_steps} were both given, and s would follow from "
            "total_steps: pass one of them."
        )
    return _TRAVEL / count("total_steps", total_steps)
