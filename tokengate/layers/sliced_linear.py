"""A fused linear layer that is patched in part: one product with W0, several gates."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokengate.gates.base import Gate
from tokengate.layers.calls import DISABLED, said_of
from tokengate.layers.experts.gated_experts import GatedExperts
from tokengate.layers.experts.owner import hold, let_go
from tokengate.layers.gated_linear import Gated, Patched, attach, detach
from tokengate.linears.class_swap import swap, swap_back
from tokengate.linears.experts import StackedLinear
from tokengate.linears.linear_like import LinearLike, LinearSlice
from tokengate.linears.slices import Slices
from tokengate.methods.base import Modification


class Sliced(Patched):
    """`(..., in_features) -> (..., out_features)`, of which each patched slice is a child.

    Never constructed: `patch` gives an existing linear layer this class. The outputs of the other
    slices stay what they were, bit for bit.
    """

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(..., in_features) -> (..., out_features)`."""
        out: Tensor = super().forward(input, *args, **kwargs)
        patched = _patched_slices(self)
        slices: Slices = patched[0].slices
        # Disabled ones too: they are reached, and what is hooked to them runs.
        parts = {part.name: part(input, slices.take(out, part.name)) for part in patched}
        on = any(not said_of(part, DISABLED) for part in patched)
        return slices.put(out, parts) if on else out


class SlicedLinear(Sliced, nn.Linear):
    """What an `nn.Linear` becomes; other kinds of linear layers become a class made for them."""

    _own_class = nn.Linear


def put_on(layer: LinearLike, modification: Modification, gate: Gate | None) -> None:
    """Turn `layer` into a gated one; of a slice also its fused layer into one that holds it."""
    if isinstance(layer, StackedLinear):
        attach(layer, modification, gate, GatedExperts)
        hold(layer)
        return
    attach(layer, modification, gate)
    if not isinstance(layer, LinearSlice):
        return
    part, fused = layer, layer.fused
    if not isinstance(fused, Sliced):
        swap(fused, SlicedLinear if isinstance(fused, nn.Linear) else Sliced)
    fused.add_module(part.name, part)
    # In their own order, also where one comes back: optimizers count parameters.
    for name in filter(fused._modules.__contains__, part.slices.sizes):
        fused._modules[name] = fused._modules.pop(name)


def take_off(layer: Gated) -> None:
    """Turn `layer` back into what it was; a fused layer after the last of its slices."""
    detach(layer)
    if isinstance(layer, StackedLinear):
        let_go(layer)
        return
    if not isinstance(layer, LinearSlice):
        return
    fused = layer.fused
    delattr(fused, layer.name)
    if isinstance(fused, Sliced) and not _patched_slices(fused):
        swap_back(fused)


def slices_of(fused: Sliced) -> Slices:
    """How the layer is divided, as its patched slices say; all of them say the same."""
    slices: Slices = _patched_slices(fused)[0].slices
    return slices


def _patched_slices(fused: Sliced) -> list[Any]:
    return [child for child in fused.children() if isinstance(child, LinearSlice)]
