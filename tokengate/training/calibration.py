"""Thresholds for modifications that were trained without a gate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.arguments import share
from tokengate.errors import TokenGateError
from tokengate.kernels.norms import Norms, ratios
from tokengate.layers.patched import require_layers
from tokengate.patching.wrappers import check_gathered
from tokengate.training.measuring import measure

# Bins of log2 r: 1024 to the octave, which is 0.07 %, from 2^-24 to 2^16.
_FINE, _LOW, _OCTAVES = 1024, -24, 40


def calibrate(model: nn.Module, batches: Iterable[Any], sparsity: float = 0.5) -> dict[str, float]:
    """Set every tau so that a share of the positions in `batches` is left unmodified:

        model = tokengate.patch(model, ["q_proj", "v_proj"])    # or load, or import from PEFT
        tokengate.calibrate(model, loader, sparsity=0.5)

    One pass, in evaluation mode and with all gates open, as the modifications were trained; tau is
    then the quantile of r = ||M(x)|| / ||W0 x|| in its layer, over all real positions, those of
    each sample together counting as one, as in eq. 23. Memory does not grow with the data: r is
    counted in bins 0.07 % wide. Where gates close, later layers see other inputs than in this pass:
    `record` tells what sparsity that gives.

    The rule is not the paper's, which learns tau.

    Args:
        model: a patched model with gates.
        batches: what the model is called with: dicts by keyword, tuples by position.
        sparsity: the share to be left unmodified in every layer, in [0, 1).

    Returns:
        The new tau of every layer by name. A layer whose r is 0 everywhere keeps its gate open.

    Raises:
        TokenGateError: no layer of the model has a gate with a threshold; `use` was given rows;
            there are no batches, or a layer was called in none of them; an argument is wrong. The
            taus are then as they were.
    """
    share("sparsity", sparsity)
    gated = {
        name: (layer, layer.gate.threshold)
        for name, layer in require_layers(model, "calibrate").items()
        if layer.gate is not None and layer.gate.threshold is not None
    }
    check_gathered(model, "calibrate", "calibrate the model before it is wrapped")
    if not gated:
        raise TokenGateError(
            f"calibrate was asked of a {type(model).__name__} whose layers have no gates with a "
            "threshold: patch it without gate=False."
        )
    counted = {name: _Ratios() for name in gated}
    taus = {name: tau.detach().clone() for name, (_, tau) in gated.items()}
    try:
        for _, tau in gated.values():
            tau.data.zero_()
        patched = {name: layer for name, (layer, _) in gated.items()}
        listeners = {name: seen.listen for name, seen in counted.items()}
        measure("calibrate", model, patched, listeners, batches)
        taus = {
            name: torch.full_like(taus[name], seen.quantile(sparsity))
            for name, seen in counted.items()
        }
        return {name: tau.item() for name, tau in taus.items()}
    finally:
        for name, (_, tau) in gated.items():
            tau.data.copy_(taus[name])


class _Ratios:
    """How often each r was seen, to 0.07 %."""

    def __init__(self) -> None:
        # The first bin is for what is below, the last for what is above, or not a number.
        self._bins = torch.zeros(_FINE * _OCTAVES + 2, dtype=torch.float64)

    @property
    def total(self) -> float:
        return self._bins.sum().item()

    def listen(self, of_m: Norms, of_w: Norms, weights: Tensor) -> None:
        self.add(ratios(of_m, of_w).cpu(), weights.cpu())

    def add(self, ratios: Tensor, weights: Tensor) -> None:
        place = ((ratios.double().log2() - _LOW) * _FINE).floor() + 1
        index = place.nan_to_num(math.inf).clamp(0, len(self._bins) - 1).long()
        self._bins += torch.bincount(index.flatten(), weights.flatten(), len(self._bins))

    def quantile(self, share: float) -> float:
        """The r below which there is this share; 0 where that is none."""
        wanted, so_far = share * self.total, self._bins.cumsum(0)
        at = int(torch.searchsorted(so_far, wanted))
        if wanted <= 0 or at == 0:
            return 0.0
        at = min(at, len(self._bins) - 2)
        within = (wanted - so_far[at - 1]) / self._bins[at] if self._bins[at] else 1.0
        return float(2.0 ** ((at - 1 + float(within)) / _FINE + _LOW))
