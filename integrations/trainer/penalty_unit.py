"""The unit of lambda under what Accelerate does to gradients."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

import tokengate
from tokengate import TokenGateError

# Where gradients are not averaged over processes, or a tau is no tensor of its own.
_REFUSED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")


def set_penalty_unit(model: nn.Module, accelerator: Accelerator) -> None:
    """`tokengate.scale_penalty` by what Accelerate does to gradients; call it before each step:

        for batch in loader:
            with accelerator.accumulate(model):
                set_penalty_unit(model, accelerator)
                accelerator.backward(model(**batch).loss)

    The factor is the number of processes, over which gradients are averaged, times the scale of a
    GradScaler, without waiting for the device. Accumulation needs none, nor does autocast.

    Args:
        model: a patched model, before or after `accelerator.prepare`.
        accelerator: of a single process, of data parallelism, or of FSDP2.

    Raises:
        TokenGateError: no layer of the model is patched, or the model is sharded in another way.
    """
    if not getattr(accelerator, "is_fsdp2", False):
        check_not_sharded(accelerator.distributed_type)
    set_unit(model, accelerator.num_processes, accelerator.scaler)


def check_not_sharded(kind: DistributedType) -> None:
    """An error where a tau cannot be trained as it is, since the model is sharded."""
    if str(kind.value) in _REFUSED:
        raise TokenGateError(
            f"the model is trained under {kind.value}, where a tau is no parameter of its own or "
            "its gradient not an average over processes: use data parallelism, or FSDP2 in a loop "
            "of your own."
        )


def set_unit(model: nn.Module, processes: int, scaler: Any = None) -> None:
    """Of a model in so many processes, under a GradScaler or none."""
    if scaler is None or not scaler.is_enabled():
        tokengate.scale_penalty(model, float(processes))
        return
    # As a tensor: get_scale() would wait for the device.
    device = next(model.parameters()).device
    tokengate.scale_penalty(model, scaler.scale(torch.full((), float(processes), device=device)))
