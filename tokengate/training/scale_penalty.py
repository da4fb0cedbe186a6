"""The unit of lambda: what multiplies tau's gradient must multiply lambda, too."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.arguments import positive
from tokengate.errors import TokenGateError
from tokengate.gates.base import Gate
from tokengate.layers.patched import all_layers, require_layers


def scale_penalty(model: nn.Module, factor: float | Tensor) -> None:
    """From now on let every gate of `model` add lambda * `factor` per open position.

    tau.grad is -(mu's part + lambda's part), and lambda is counted once for each open position of
    the whole optimiser step (eq. 17). Micro-batches whose losses are divided by their number add
    up to just that, so accumulation needs no factor. Two things do:

    - Data parallelism (DDP, FSDP2, ZeRO) averages gradients over R ranks, and each rank counts its
      own positions only: factor R.
    - A GradScaler multiplies the loss, hence mu's part alone, and divides gradients before the
      step: factor `scaler.get_scale()`, before each step's first forward. A tensor is copied
      without waiting for the device.

    Together, the product. tau then moves as in float32 on one rank. Adapters that are out of use
    are told, too.

    Args:
        model: a patched model.
        factor: a positive number, or a tensor of one element; 1 takes it back.

    Raises:
        TokenGateError: no layer of the model is patched, or `factor` is no positive number, which
            is known of numbers and of tensors on the CPU; others are not waited for.
    """
    if isinstance(factor, Tensor):
        if factor.numel() != 1 or not factor.is_floating_point():
            raise TokenGateError(
                f"factor has shape {tuple(factor.shape)} and dtype {factor.dtype}: pass one "
                "floating-point number."
            )
        if _readable(factor):
            positive("factor", factor.item())
    else:
        factor = positive("factor", factor)
    # Those out of use, too: they may come into use before it is said again.
    for layer in (all_layers(model) or require_layers(model, "scale_penalty")).values():
        for part in layer.all_parts():
            for module in () if part is None else part.modules():
                if isinstance(module, Gate):
                    _set(module, factor)


def set_unit(model: nn.Module, factor: float, scaler: Any = None) -> None:
    """The same of a model in as many processes as `factor` says, under a GradScaler or none."""
    if scaler is None or not scaler.is_enabled():
        scale_penalty(model, factor)
        return
    # As a tensor: get_scale() would wait for the device.
    device = next(model.parameters()).device
    scale_penalty(model, scaler.scale(torch.full((), factor, device=device)))


def _readable(factor: Tensor) -> bool:
    """Whether its value is known without waiting for a device, and is no graph's to compute."""
    plain = type(factor) in (Tensor, nn.Parameter)
    return plain and factor.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.no_grad()
def _set(gate: Gate, factor: float | Tensor) -> None:
    if not isinstance(factor, Tensor) and factor == 1:
        gate._unit = None
        return
    if gate._unit is None:
        own = next(itertools.chain(gate.parameters(), gate.buffers()), torch.empty(()))
        gate._unit = torch.empty((), dtype=own.dtype, device=own.device)
    if isinstance(factor, Tensor):
        gate._unit.copy_(factor.reshape(()), non_blocking=True)
    else:
        gate._unit.fill_(factor)
