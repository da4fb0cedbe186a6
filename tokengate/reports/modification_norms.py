"""How large the modifications are: the paper's two other measures of a module's importance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.kernels.norms import Norms, ratios, times
from tokengate.layers.patched import module_names, require_layers
from tokengate.reports.selection import Importance
from tokengate.training.measuring import measure


@dataclass(frozen=True)
class ModificationNorms:
    """Averages over positions, then over samples, of every module by name.

    The names in section 5 of the gate's paper are `norm_relative` and `norm_abs`.
    """

    relative: dict[str, float]
    """Of ||M(x_i)|| / ||W0 x_i||; infinite where some M(x_i) is not 0 but its W0 x_i is."""
    absolute: dict[str, float]
    """Of ||M(x_i)||, in the unit of the layer's output."""


def modification_norms(model: nn.Module, batches: Iterable[Any]) -> ModificationNorms:
    """The average sizes of M(x_i) in every patched layer (section 5 of the gate's paper):

        norms = tokengate.modification_norms(model, loader)
        targets = tokengate.select(norms.relative)

    One pass in evaluation mode, gated or not; gates act as they are, and M(x_i) counts at the
    positions they leave unmodified, too. Norms are of outputs, not of weights: they depend on the
    data, and a nonlinear adapter has them like any other method. Padding does not count, and
    samples weigh the same whatever their length, as in eq. 23. Nothing of the model changes.

    Args:
        model: a patched model; for what the paper measures, one that was trained with `gate=False`.
        batches: what the model is called with: dicts by keyword, tuples by position.

    Raises:
        TokenGateError: no layer of the model is patched; `use` was given rows; there are no
            batches, or a layer was called in none of them.
    """
    patched = require_layers(model, "modification_norms")
    means = {own: _Means() for n, layer in patched.items() for own in module_names(n, layer)}
    listeners = {name: mean.listen for name, mean in means.items()}
    measure("modification_norms", model, patched, listeners, batches)
    means = {name: mean for name, mean in means.items() if mean.samples}  # not idle experts
    return ModificationNorms(
        Importance((name, mean.relative / mean.samples) for name, mean in means.items()),
        Importance((name, mean.absolute / mean.samples) for name, mean in means.items()),
    )


class _Means:
    """Sums over the samples of one layer."""

    samples = relative = absolute = 0.0

    def listen(self, of_m: Norms, of_w: Norms, weights: Tensor) -> None:
        weights = weights.cpu()
        size, power = of_m
        absolute = times(size.double(), power).cpu()
        # 0 / 0 is a position that nothing was done to.
        relative = torch.where(absolute == 0, 0.0, ratios(of_m, of_w).cpu().double())
        self.samples += weights.sum().item()
        self.absolute += _sum(absolute, weights)
        self.relative += _sum(relative, weights)


def _sum(values: Tensor, weights: Tensor) -> float:
    # A selection: what padding holds may be infinite, and weighs 0.
    return torch.where(weights > 0, values * weights, 0.0).sum().item()
