"""The unit of lambda under what Accelerate does to gradients."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import tokengate
from tokengate.integrations.trainer.engines import deepspeed_of, sharding_of


def set_penalty_unit(model: nn.Module, accelerator: Accelerator) -> None:
    """`tokengate.scale_penalty` by what Accelerate does to gradients; call it before each step:

        for batch in loader:
            with accelerator.accumulate(model):
                set_penalty_unit(model, accelerator)
                accelerator.backward(model(**batch).loss)

    The factor is the number of processes, over which gradients are averaged, times the scale of a
    GradScaler, without waiting for the device, or of ZeRO. Accumulation needs none, nor does
    autocast.

    Args:
        model: a patched model, before or after `accelerator.prepare`.
        accelerator: of a single process, of data parallelism, of FSDP2, or of DeepSpeed's ZeRO.

    Raises:
        TokenGateError: no layer of the model is patched, or the model is sharded in another way.
    """
    factor = float(accelerator.num_processes)
    engine = deepspeed_of(accelerator) if sharding_of(accelerator) == "ZeRO" else None
    if engine is not None:
        factor *= float(engine.optimizer.loss_scale)
    set_unit(model, factor, accelerator.scaler)


def set_unit(model: nn.Module, factor: float, scaler: Any = None) -> None:
    """Of a model in as many processes as `factor` says, under a GradScaler or none."""
    if scaler is None or not scaler.is_enabled():
        tokengate.scale_penalty(model, factor)
        return
    # As a tensor: get_scale() would wait for the device.
    device = next(model.parameters()).device
    tokengate.scale_penalty(model, scaler.scale(torch.full((), factor, device=device)))
