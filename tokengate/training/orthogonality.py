"""AdaLoRA's penalty on factors that are not orthogonal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.kernels.precision import without_autocast
from tokengate.layers.patched import require_layers
from tokengate.methods.adalora import AdaLoRA
from tokengate.patching.wrappers import check_gathered
from tokengate.sharding import gathered


def adalora_layers(model: nn.Module, asked: str) -> dict[str, AdaLoRA]:
    """The AdaLoRA modifications of `model` by layer name; an error if there is none."""
    patched = require_layers(model, asked)
    check_gathered(model, asked, "train AdaLoRA without FSDP")
    found = {
        name: layer.modification
        for name, layer in patched.items()
        if isinstance(layer.modification, AdaLoRA)
    }
    if not found:
        raise TokenGateError(
            f"{asked} was asked of a {type(model).__name__} whose patched layers have no AdaLoRA: "
            'patch with method="adalora".'
        )
    return found


def orthogonality(model: nn.Module) -> Tensor:
    """How far AdaLoRA's factors are from orthogonal, `()`: add it to the loss, weighted:

        loss = model(**batch).loss + 0.1 * tokengate.orthogonality(model)

    The mean, over all P and Q of the model, of ||P'P - I|| and ||QQ' - I|| (Frobenius norms; Zhang
    et al., 2023, section 3.1). The paper squares the norms; not squared and averaged, as here, is
    what its authors' code and Hugging Face PEFT compute, so their weights (0.1 to 0.5) carry over.
    Under FSDP2 every rank calls it, after the model's forward.

    Raises:
        TokenGateError: no layer of the model has an AdaLoRA.
    """
    return _distance(adalora_layers(model, "orthogonality").values())


def _distance(modifications: Iterable[AdaLoRA]) -> Tensor:
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for modification in modifications:
        P, Q = gathered(modification.P), gathered(modification.Q)
        with without_autocast(P.device):  # 16 bits would round what is nearly orthogonal to it
            grams = [P.mT @ P, Q @ Q.mT]
        alike.setdefault((P.device, P.dtype, grams[0].shape), []).extend(grams)
    distances = []
    for (device, dtype, shape), grams in alike.items():  # in one, as many operations as of one take
        identity = torch.eye(shape[-1], dtype=dtype, device=device)
        # Of each expert one, where there are several.
        far = torch.linalg.vector_norm(torch.stack(grams) - identity, dim=(-2, -1))
        distances.append(far.flatten())
    # A model may be spread over devices.
    return torch.cat([d.to(distances[0].device) for d in distances]).mean()


def penalty_gradients(model: nn.Module, weight: float) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
    """The penalty, and of each P and Q its gradient times `weight`."""
    own = adalora_layers(model, "orthogonality").values()
    factors = [p for modification in own for p in (modification.P, modification.Q)]
    with torch.enable_grad():
        distance = _distance(own)
        gradients = torch.autograd.grad(weight * distance, factors)
    return distance.detach(), dict(zip(factors, gradients, strict=True))


def add_penalty(model: nn.Module, weight: float) -> Tensor:
    """Add these to gradients that are summed up and averaged: once a step. The penalty."""
    distance, gradients = penalty_gradients(model, weight)
    for factor, gradient in gradients.items():
        factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)
    return distance
