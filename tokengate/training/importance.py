"""How important every singular value of AdaLoRA's layers is, from the steps seen so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokengate.methods.adalora import AdaLoRA
from tokengate.sharding import gathered

FACTORS = ("P", "E", "Q")

# By layer and factor, from a layer's first gradient to the last allocation.
ByFactor = dict[str, dict[str, Tensor]]


class Importance:
    """Smoothed sensitivity and uncertainty of every entry of P, E and Q.

    Source: Zhang et al., 2023 (arXiv 2303.10512), eq. 8-10 and 12; see `RankAllocator`.

    Attributes:
        sensitivity: I', by layer and factor.
        uncertainty: U', likewise.
        gradients: of the step that is taken, copies.
    """

    def __init__(self, modifications: dict[str, AdaLoRA], beta1: float, beta2: float) -> None:
        self._modifications = modifications
        self._betas = beta1, beta2
        self.sensitivity: ByFactor = {}
        self.uncertainty: ByFactor = {}
        self.gradients: ByFactor = {}

    def factors(self, name: str) -> dict[str, nn.Parameter]:
        """P, E and Q of a layer."""
        return {factor: getattr(self._modifications[name], factor) for factor in FACTORS}

    def read(self, loss_scale: Any) -> set[str]:
        """Copy the gradients, which an optimiser may rewrite; the layers that were reached."""
        self.gradients = {
            name: {
                factor: parameter.grad.detach() / (1.0 if loss_scale is None else loss_scale)
                for factor, parameter in self.factors(name).items()
                if parameter.grad is not None
            }
            for name in self._modifications
        }
        # The orthogonality penalty gives P and Q gradients, whether the layer was called or not.
        return {name for name, gradients in self.gradients.items() if "E" in gradients}

    def update(self) -> None:
        """After a step: its gradients, times what the values have become."""
        found: list[tuple[Tensor, ...]] = []
        for name, gradients in self.gradients.items():
            if name not in self.sensitivity:
                if "E" not in gradients:  # it was never called and has no importance yet
                    continue
                zeros = {f: torch.zeros_like(p) for f, p in self.factors(name).items()}
                self.sensitivity[name] = zeros
                self.uncertainty[name] = {f: z.clone() for f, z in zeros.items()}
            for factor, parameter in self.factors(name).items():
                # The gradients are copies, and used up here.
                now = gradients[factor] if factor in gradients else torch.zeros_like(parameter)
                averages = self.sensitivity[name][factor], self.uncertainty[name][factor]
                found.append((now, parameter, *averages))
        self.gradients = {}
        # Some layers may be sharded, and together with others alike alone.
        alike: dict[Any, list[tuple[Tensor, ...]]] = {}
        for each in found:
            alike.setdefault(tuple(map(_kind, each)), []).append(each)
        for group in alike.values():
            self._average(group)

    def _average(self, found: list[tuple[Tensor, ...]]) -> None:
        beta1, beta2 = self._betas
        changes, values, smoothed, uncertain = (list(each) for each in zip(*found, strict=True))
        torch._foreach_mul_(changes, values)
        torch._foreach_abs_(changes)
        for change in changes:
            change.nan_to_num_(nan=0.0, posinf=0.0)
        torch._foreach_lerp_(smoothed, changes, 1 - beta1)
        torch._foreach_sub_(changes, smoothed)
        torch._foreach_abs_(changes)
        torch._foreach_lerp_(uncertain, changes, 1 - beta2)

    def scores(self, name: str) -> Tensor:
        """One score for each singular value of a layer, `(rank,)`; of experts, `(E, rank)`."""
        if name not in self.sensitivity:
            E = self._modifications[name].E
            return torch.zeros(E.shape, dtype=E.dtype, device=E.device)
        # Gathered before they are averaged, so that the order of summation is one process's.
        s = {f: gathered(self.sensitivity[name][f] * self.uncertainty[name][f]) for f in FACTORS}
        return s["E"] + s["P"].mean(-2) + s["Q"].mean(-1)


def _kind(tensor: Tensor) -> tuple[type, Any]:
    return type(tensor), getattr(tensor, "device_mesh", None)
