"""Clipping that leaves the taus out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from tokengate.gates.living import living_taus


def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    **options: Any,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of all `parameters` but the taus:

        tokengate.clip_grad_norm_(model.parameters(), 1.0)

    tau.grad is a sum over positions, lambda's part among it, and no derivative: in one norm with
    the others it would shrink theirs, and Adam divides out what clipping does to its own.

    Args:
        parameters: as torch takes them, or a model.
        max_norm: the norm that the gradients are to have at most.
        norm_type: of which kind the norm is.
        **options: of torch's function.

    Returns:
        The norm before, without the taus' gradients.
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    asked = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    taus = living_taus()
    others = [p for p in asked if id(p) not in taus]
    return nn.utils.clip_grad_norm_(others, max_norm, norm_type, **options)
