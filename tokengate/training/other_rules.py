"""A tau that an optimiser moves by another rule than eq. 18-22: it is said once of each optimiser.

With the group that `param_groups` makes, Adam's step is tau's own rule. With another optimiser, in
a group with other parameters, or when a scheduler has set the group's learning rate as it set the
others', tau ends elsewhere, and nothing in the loss would tell.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from tokengate.errors import OtherRuleWarning, TokenGateError, brief
from tokengate.gates.base import Gate
from tokengate.gates.living import taus_held_by
from tokengate.gates.optimizer_steps import watch_steps
from tokengate.training.following import followed
from tokengate.training.tau_adam import TauAdam
from tokengate.training.wrapped_optimizers import other_numbers

_TOLD: WeakSet[Optimizer] = WeakSet()
# Adam as it is called by who makes it faster or smaller: AdamW, FusedAdam, PagedAdamW8bit.
_ADAM = re.compile(r"(Paged|Fused|FP|DeepSpeedCPU)?AdamW?(8bit|32bit)?")
# Adam's decay rates for tau under eq. 18-22.
_BETAS = (0.9, 0.98)
_REMEDY = (
    "give it its own rule with tokengate.follow(model, optimizer, s=...), which works with every "
    "optimizer and scheduler"
)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    for group, _own in _moved(optimizer):
        _check_numbers(optimizer, group)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Where a closure has made gradients, too; a step without any tells nothing."""
    for group, own in _moved(optimizer):
        found = _other_rule(optimizer, group, [gate for gate, has_moved in own if has_moved])
        if found is not None:
            _TOLD.add(optimizer)
            warnings.warn(f"{found}: {_REMEDY}.", OtherRuleWarning, stacklevel=5)
            return


def _moved(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[tuple[Gate, bool]]]]:
    """The groups with taus, whose these are, and whether each has a gradient."""
    if optimizer in _TOLD or isinstance(optimizer, TauAdam):
        return
    taus = taus_held_by(optimizer)
    apart = followed(optimizer) if taus else set()
    for group in optimizer.param_groups if taus else ():
        own = [p for p in group["params"] if id(p) in taus and id(p) not in apart]
        if own:
            yield group, [(taus[id(p)], p.grad is not None) for p in own]


def _other_rule(optimizer: Optimizer, group: dict[str, Any], own: list[Gate]) -> str | None:
    """In words, what moves the taus of these gates, if it is not their own rule."""
    if not own:
        return None
    name = type(optimizer).__name__
    lr = group.get("lr")
    at = "" if lr is None or isinstance(lr, Tensor) else f" at learning rate {lr:g}"
    taus = taus_held_by(optimizer)
    if any(id(p) not in taus for p in group["params"]):
        return f"{name} moves {len(own)} taus{at} in a group with other parameters"
    if not any(_ADAM.fullmatch(kind.__name__) for kind in type(optimizer).__mro__):
        return f"{name} moves {len(own)} taus by its own rule, under which s bounds no step"
    rule = own[0]._rule
    if group.get("weight_decay"):
        return f"{name} moves {len(own)} taus{at} and draws them to 0 by its weight decay"
    if rule is None:
        ours = tuple(group.get("betas", ())) == _BETAS
        return None if ours else f"{name} moves {len(own)} taus{at} in a group of its own numbers"
    if lr is not None and not isinstance(lr, Tensor) and lr > rule["lr"] * (1 + 1e-6):
        return (
            f"{name} moves {len(own)} taus{at}, where {rule['lr']:g} was asked, as a scheduler "
            "does that sets all groups to one number"
        )
    if tuple(group.get("betas", rule["betas"])) != rule["betas"]:
        return (
            f"{name} moves {len(own)} taus with betas {group['betas']}, where {rule['betas']} was "
            "asked, as a scheduler does that cycles momentum"
        )
    return None


def _check_numbers(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Adafactor's eps are two, AdEMAMix's betas three: their own error would tell nothing."""
    for key in other_numbers(optimizer, group):
        raise TokenGateError(
            f"{type(optimizer).__name__} takes {brief(optimizer.defaults[key])} for {key}, and the "
            "taus' group of param_groups has Adam's: pass it tokengate.param_groups(model, lr)[:1] "
            "and call tokengate.follow(model, optimizer, s=...)."
        )


watch_steps(_before_step, _after_step)
