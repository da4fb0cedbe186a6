"""A module whose experts' projections are 3-D parameters, some of them patched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType
from typing import Any, cast

from torch import Tensor, nn

from tokengate.layers.experts.gated_experts import GatedExperts
from tokengate.layers.experts.products import Held, Whose
from tokengate.layers.experts.routing import Routing
from tokengate.linears.class_swap import Swapped, swap, swap_back
from tokengate.linears.experts import StackedLinear
from tokengate.names import Holder

# Its child that holds the patched projections.
_CHILD = "projections"


class Experts(Swapped):
    """A module of experts that reads its patched parameters as `Held`; never constructed.

    Its own forward runs, whichever way it multiplies.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What its own class returns, of changed products."""
        routing = Routing(args, kwargs)
        held = {}
        for name, layers in _by_parameter(self).items():
            change = functools.partial(_changed, layers, routing)
            held[name] = Held(layers[0].held, layers[0].stack.axes, name, change)
        reading: Any = _Reading(self, held)
        output = self._own_class.forward(reading, *args, **kwargs)
        for layer in patched_projections(self):
            if layer.key not in routing.calls and not routing.is_empty():
                raise held[layer.parameter].unknown("no product at all")
        return output


class _Reading:
    """A module as its own code, its methods too, sees it while its products are changed."""

    def __init__(self, module: nn.Module, held: dict[str, Held]) -> None:
        self.__dict__["_module"], self.__dict__["_held"] = module, held

    def __getattr__(self, name: str) -> Any:
        held = self._held.get(name)
        if held is not None:
            return held
        found = getattr(self._module._own_class, name, None)
        if isinstance(found, FunctionType):
            return functools.partial(found, self)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def _changed(
    layers: list[GatedExperts],
    routing: Routing,
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    whose: Whose,
) -> Tensor:
    """A product of the owner's, `(N, out_features)`, as its patched projections change it."""
    first = layers[0]
    if first.part is None:
        return cast(Tensor, first(x, out, bias, whose, routing))
    slices = first.stack.slices
    assert slices is not None
    parts = {}
    for layer in layers:
        own_bias = None if bias is None else layer.take(bias)
        parts[cast(str, layer.part)] = layer(x, layer.take(out), own_bias, whose, routing)
    return slices.put(out, parts)


def _by_parameter(owner: nn.Module) -> dict[str, list[GatedExperts]]:
    found: dict[str, list[GatedExperts]] = {}
    for layer in patched_projections(owner):
        found.setdefault(layer.parameter, []).append(layer)
    return found


def patched_projections(owner: nn.Module) -> Iterator[GatedExperts]:
    """Those of one module of experts."""
    child = owner._modules.get(_CHILD)
    for module in () if child is None else child.modules():
        if isinstance(module, GatedExperts):
            yield module


def hold(layer: StackedLinear) -> None:
    """Put a patched projection into its owner, which becomes one that reads it."""
    owner = layer.owner
    if not isinstance(owner, Experts):
        swap(owner, Experts)
        owner.add_module(_CHILD, Holder())
    home: nn.Module = owner._modules[_CHILD]  # type: ignore[assignment]
    if layer.part is not None:
        if layer.parameter not in home._modules:
            home.add_module(layer.parameter, Holder(named=True))
        home._modules[layer.parameter].add_module(layer.part, layer)  # type: ignore[union-attr]
    else:
        home.add_module(layer.parameter, layer)


def let_go(layer: StackedLinear) -> None:
    """Take it out again; the last one gives its owner its own class back."""
    owner: Any = layer.owner
    home = owner._modules[_CHILD]
    if layer.part is None:
        del home._modules[layer.parameter]
    else:
        del home._modules[layer.parameter]._modules[layer.part]
        if not home._modules[layer.parameter]._modules:
            del home._modules[layer.parameter]
    if not home._modules:
        del owner._modules[_CHILD]
        swap_back(owner)
