"""What the callbacks of Hugging Face's Trainer and of Lightning have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokengate import SparsitySchedule, TokenGateError
from tokengate.arguments import count, non_negative, share, switch, unused, wanted_sparsity
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


@dataclass(frozen=True)
class Leading:
    """What a callback was asked of a schedule, checked now and not after an hour of training.

    Attributes:
        target: the sparsity that it is to lead to, or None if nothing is led.
        warmup: the steps before it, or their share of all; None for none.
        settle: whether it sets its last thresholds by calling the model again; None for yes.

    Raises:
        TokenGateError: a number is out of its range, or of no use without a target.
    """

    target: float | None
    warmup: int | float | None
    settle: bool | None

    def __post_init__(self) -> None:
        if self.target is None:
            where = "without target_sparsity="
            unused(_ASKED, where, target_warmup=self.warmup, settle=self.settle)
            return
        wanted_sparsity("target_sparsity", self.target)
        if self.settle is not None:
            switch("settle", self.settle)
        if isinstance(self.warmup, float):
            share("target_warmup", self.warmup)
        elif self.warmup is not None:
            count("target_warmup", self.warmup, least=0)

    def schedule(
        self, model: nn.Module, optimizer: Any, steps: int | None
    ) -> SparsitySchedule | None:
        """The one that leads `model` over a training of so many `steps`.

        Raises:
            TokenGateError: that training has no end.
        """
        if self.target is None:
            return None
        if steps is None:
            raise TokenGateError(
                f"target_sparsity={self.target} was asked of a training without an end: give "
                "Lightning's Trainer max_steps or max_epochs."
            )
        warmup = 0 if self.warmup is None else self.warmup
        if isinstance(warmup, float):
            warmup = int(warmup * steps)
        settle = self.settle is not False
        return SparsitySchedule(
            model, optimizer, self.target, steps, warmup_steps=warmup, settle=settle
        )


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
