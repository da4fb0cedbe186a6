"""Who trains a Trainer's model: each process all of it, or all together one that is divided."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokengate import TokenGateError
from tokengate.integrations.trainer.sharded_steps import ShardedTauSteps
from tokengate.integrations.trainer.surroundings import unwrapped
from tokengate.integrations.trainer.tau_steps import TauSteps, trained_taus
from tokengate.integrations.trainer.zero import ZeroStep
from tokengate.methods.adalora import AdaLoRA


class Engine:
    """Each process has all of the model, whether there is one or many.

    Attributes:
        optimizer: whose steps are hooked.
        kind: what moves the taus in them.
        apart: whether a checkpoint's optimiser has no room for a state of ours.
    """

    kind = TauSteps
    apart = False

    def __init__(self, optimizer: Any) -> None:
        self.optimizer: Any = optimizer

    @property
    def distance(self) -> Tensor | None:
        """AdaLoRA's from orthogonality, where it is the engine that adds the penalty."""
        return None

    def restore(self, before: dict[nn.Parameter, Tensor]) -> None:
        """Give back what was rounded in dividing the model."""

    def values(self) -> Any:
        """A context in which every process has all that is trained, and may write it."""
        return contextlib.nullcontext()

    def begin(self) -> None:
        """Before a step."""

    def finish(self) -> None:
        """After a step that was not skipped."""

    def detach(self) -> None:
        """No more."""


class FSDP2(Engine):
    """The parameters are divided, tensor by tensor."""

    kind = ShardedTauSteps
    apart = True


class Zero(Engine):
    """The optimiser is divided, and perhaps the parameters; see `zero.py`."""

    apart = True

    @property
    def distance(self) -> Tensor | None:
        """At the last step."""
        found: Tensor | None = self.optimizer.distance
        return found

    def __init__(self, optimizer: ZeroStep) -> None:
        super().__init__(optimizer)
        self.values, self.begin = optimizer.values, optimizer.begin  # type: ignore[method-assign]
        self.finish, self.detach = optimizer.finish, optimizer.detach  # type: ignore[method-assign]
        self.restore = optimizer.restore  # type: ignore[method-assign]


def engine_of(
    accelerator: Accelerator,
    optimizer: Any,
    model: nn.Module,
    adalora: Sequence[AdaLoRA],
    weight: float,
) -> Engine:
    """Who trains `model`, once it is prepared; `weight` is that of AdaLoRA's penalty.

    Raises:
        TokenGateError: the model is divided in a way in which its taus cannot be trained.
    """
    sharding = sharding_of(accelerator)
    if sharding == "ZeRO":
        taus = list(trained_taus(model).values())
        return Zero(ZeroStep(deepspeed_of(accelerator), model, taus, adalora, weight))
    if sharding:
        _warn_of_rounding(accelerator)
        return FSDP2(unwrapped(optimizer))
    return Engine(unwrapped(optimizer))


def _warn_of_rounding(accelerator: Accelerator) -> None:
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    dtype = getattr(policy, "param_dtype", None)
    if dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"FSDP2 computes with tau, A and B rounded to {dtype}, and so tau moves in steps of "
            "that: load the base in 16 bits and train without bf16=True or fp16=True, and what is "
            "trained stays float32.",
            stacklevel=2,
        )


def sharding_of(accelerator: Accelerator) -> str:
    """`"FSDP2"`, `"ZeRO"`, or `""` where every process has the whole model.

    Raises:
        TokenGateError: a tau cannot be trained as it is, since the model is divided otherwise.
    """
    kind = str(accelerator.distributed_type.value)
    axes = getattr(accelerator, "parallelism_config", None)
    # Gradients are then no average over all processes.
    axis = next((a for a in ("tp", "cp", "sp") if getattr(axes, f"{a}_size", 1) > 1), None)
    if axis is not None:
        kind = f"{kind} with {axis}_size={getattr(axes, f'{axis}_size')}"
    elif kind == "DEEPSPEED":
        if accelerator.state.deepspeed_plugin.zero_stage > 0:
            return "ZeRO"
        kind = "DEEPSPEED of stage 0"
    elif kind == "FSDP":
        if getattr(accelerator, "is_fsdp2", False):
            return "FSDP2"
        kind = "FSDP of version 1"
    elif kind not in ("MEGATRON_LM", "XLA"):
        return ""
    raise TokenGateError(
        f"the model is trained under {kind}, where a tau is no parameter of its own or its "
        "gradient not an average over processes: use data parallelism, FSDP2 (fsdp_version=2) or "
        "DeepSpeed's ZeRO, of stage 1 to 3."
    )


def deepspeed_of(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine, or None before it has been made."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return None if wrapped is None else wrapped.engine
