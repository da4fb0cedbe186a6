"""tau's steps in units of what r is: where a training's length is known, and no s was given.

How large ||m_i|| / ||w_i|| will be nobody knows before, and at first it is 0. A tau that went its
way in absolute steps would be beyond all of it before M(x) has grown. So the steps that an
optimiser takes with a tau, whichever it is, are multiplied by the median of r in its layer, of the
positions of that step: the taus' learning rate is then a share of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tokengate.gates.base import Gate
from tokengate.gates.living import held_by, tau_of
from tokengate.gates.optimizer_steps import watch_steps
from tokengate.gates.score_counts import log_quantile
from tokengate.sharding import in_processes, local_part
from tokengate.training.following import followed
from tokengate.training.wrapped_optimizers import Follower

# The values of the taus before a step, by the optimiser that takes it.
_BEFORE: WeakKeyDictionary[Optimizer, dict[nn.Parameter, Tensor]] = WeakKeyDictionary()


def moved_by(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Gate]]:
    """The taus that the steps of this optimiser move, and whose they are."""
    held = [(tau, gate) for gate, tau in held_by(optimizer) if tau_of(gate) is tau]
    # One that holds taus which follow it leaves them to that which moves them.
    apart = followed(optimizer) if held and not isinstance(optimizer, Follower) else set()
    return ((tau, gate) for tau, gate in held if id(tau) not in apart)


def _paced(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Gate]]:
    """The taus that this optimiser moves in these units."""
    return ((p, gate) for p, gate in moved_by(optimizer) if gate.relative and not gate.is_led)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    held = {p: local_part(p).detach().clone() for p, _ in _paced(optimizer)}
    if held and optimizer not in _BEFORE:  # a step that calls its parent class's is announced twice
        _BEFORE[optimizer] = held


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if before := _BEFORE.pop(optimizer, None):
        _pace(optimizer, before)


@torch.no_grad()
def _pace(optimizer: Optimizer, before: dict[nn.Parameter, Tensor]) -> None:
    own = [(p, gate) for p, gate in _paced(optimizer) if p in before and gate._seen is not None]
    if not own:
        return
    device = next(iter(before.values())).device
    seen = torch.stack([gate._seen.to(device) for _, gate in own if gate._seen is not None])
    if in_processes():
        torch.distributed.all_reduce(seen)
    seen[:, -1] = 0  # where w is 0
    # Of a layer without positions, or with M(x) = 0, it is 0: its tau stays.
    medians = log_quantile(seen, 0.5).exp2()
    for (tau, gate), median in zip(own, medians, strict=True):
        there = local_part(tau)
        there.copy_(torch.lerp(before[tau], there, median.to(there)))
        if gate._seen is not None:
            gate._seen.zero_()


watch_steps(_before_step, _after_step)
