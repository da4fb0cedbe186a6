"""The unit of lambda under what Accelerate does to gradients."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from tokengate.integrations.trainer.engines import deepspeed_of, sharding_of
from tokengate.training.scale_penalty import set_unit


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
