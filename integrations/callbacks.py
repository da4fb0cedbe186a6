"""What the callbacks of Hugging Face's Trainer and of Lightning have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokengate import TokenGateError
from tokengate.arguments import non_negative, unused, wanted_sparsity
from tokengate.training.param_groups import tau_rule

_ASKED = "TokenGateCallback"


def tau_numbers(s: float | None, **rule: Any) -> dict[str, Any]:
    """The numbers of tau's own rule, checked now and not after an hour of training.

    Args:
        s: slope of eq. 11, or None where the length of the training gives it.
        rule: alpha, betas and eps.

    Raises:
        TokenGateError: a number is out of its range.
    """
    tau_rule(0.0 if s is None else non_negative("s", s), **rule)
    return {"s": s, **rule}


def check_target(target: float | None, warmup: float | None) -> None:
    """An error if the sparsity that a schedule is to lead to is none, or a warmup of nothing.

    Args:
        target: that sparsity, or None if nothing is led.
        warmup: the steps before it, or None.
    """
    if target is None:
        unused(_ASKED, "without target_sparsity=", target_warmup=warmup)
    else:
        wanted_sparsity("target_sparsity", target)


def refuse_allocation(allocation: Mapping[str, Any]) -> None:
    """An error if options of an allocator were given for a model that has nothing to allocate."""
    unused(_ASKED, "without AdaLoRA layers", allocator=allocation or None)


def resume(parts: Mapping[str, Any], saved: Mapping[str, Any], step: int) -> None:
    """Give what leads a training the state that the checkpoint at `step` has of it.

    Raises:
        TokenGateError: it has none of one of them.
    """
    for name, part in parts.items():
        if name not in saved:
            raise TokenGateError(
                f"the checkpoint at step {step} has no state of the {name}: resume with the "
                "options that the run was started with."
            )
        part.load_state_dict(saved[name])
