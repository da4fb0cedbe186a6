"""A gate's gradient that is not finite moves nothing: it is skipped, counted, and said once.

One step with it would make tau NaN, the gate open for good and the loss none the worse. It is
looked for where an optimiser takes its step, and not in backward: by then micro-batches and ranks
are summed up, a GradScaler has seen what it has to see, and whoever writes gradients has done so.
To look takes one transfer from the device for each step, however many gates there are. Not seen are
optimisers that hold other tensors than the gates' own parameters, as DeepSpeed's ZeRO and FSDP1 do.
"""

from __future__ import annotations

import math
import warnings
from itertools import compress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tokengate.errors import NonFiniteWarning
from tokengate.gates.living import held_by
from tokengate.gates.optimizer_steps import Arguments, once_there_are_gradients, watch_steps
from tokengate.kernels.eager import is_captured
from tokengate.sharding import anywhere, local_part, numbers_here


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    if getattr(optimizer, "found_inf", None) is not None:
        return None  # a GradScaler has looked, and a fused optimiser leaves such a step out itself
    changed = once_there_are_gradients(args, kwargs, lambda: _skip(optimizer))
    if changed is None or not held_by(optimizer):
        return None
    _skip(optimizer)  # what was there before the closure, by which some optimisers step, too
    return changed


def _skip(optimizer: Optimizer) -> None:
    held = [(gate, p) for gate, p in held_by(optimizer) if p.grad is not None]
    gradients = [p.grad for _, p in held if p.grad is not None]
    if not held:
        return
    if is_captured():
        for gradient in gradients:  # nothing can be asked here: what is not finite counts as 0
            local_part(gradient).nan_to_num_(0.0, 0.0, 0.0)
        return
    sizes = numbers_here(map(_size, gradients))
    here = (size is not None and not math.isfinite(size) for size in sizes)
    broken = list(compress(held, anywhere(here, gradients)))
    if not broken:
        return
    told = any(gate.skipped for gate, _ in held)
    for _, parameter in broken:
        parameter.grad = None  # no optimiser touches a parameter without a gradient
    for gate in {gate for gate, _ in broken}:
        gate.skipped += 1
    if not told:
        warnings.warn(
            f"{len({gate for gate, _ in broken})} of the {len({gate for gate, _ in held})} gates "
            f"that {type(optimizer).__name__} trains had a gradient that is not finite: it is "
            "skipped, now and whenever it happens again, and counted in the gate's `skipped`; look "
            "at the loss and at the inputs, or lower the learning rate.",
            NonFiniteWarning,
            stacklevel=8,
        )


def _size(gradient: Tensor) -> Tensor:
    """One number that is finite where the gradient is, or none where this rank has none of it."""
    local = local_part(gradient.detach())
    return local if local.numel() < 2 else local.abs().amax()


watch_steps(_before_step)
