"""The modifications, or the gates, of several layers in one module: each parameter a stack.

They are made one by one, as those of single layers are, and then hold their values together:
`(E, r, k)` in place of E times `(r, k)`, and `(E,)` where each has a single number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.linears.class_swap import Swapped, swap
from tokengate.linears.experts import StackedLinear

# What all of them add to, or are told alike.
_SHARED = ("_seen", "_looked", "_unit")


class Stacked(Swapped):
    """What a module of one layer becomes, once it has the values of several; see `stacked`."""

    layers: int
    # Whether single numbers of its layers, `(1,)`, are one after another, `(E,)`, and not `(E, 1)`.
    flat: bool

    @classmethod
    def _members_for(cls, own_class: type[nn.Module]) -> dict[str, Any]:
        return {"__name__": own_class.__name__, "__doc__": own_class.__doc__}

    def each(self) -> list[Any]:
        """The modules of its layers, as views through which gradients flow."""
        return _views(self, lambda parts: parts)

    def some(self, layers: Sequence[int]) -> Any:
        """Another module that has the values of some of its layers alone."""
        made: Any = copy.deepcopy(self)
        at = list(layers)
        for kind, name, values in made._values():
            own = getattr(made, kind)
            picked = values.detach()[at]
            is_learnt = isinstance(values, nn.Parameter)
            own[name] = nn.Parameter(picked, values.requires_grad) if is_learnt else picked
        made.layers = len(at)
        return made

    @torch.no_grad()
    def take(self, other: Any, layers: Sequence[int]) -> None:
        """Give some of its layers, in place, the values of another module that `some` made."""
        at = list(layers)
        for kind, name, values in other._values():
            own = getattr(self, kind)[name]
            own[at] = values.detach().to(own)

    def _values(self) -> list[tuple[str, str, Tensor]]:
        """What has a place for each layer: where it is, under which name."""
        return [
            (kind, name, value)
            for kind in ("_parameters", "_buffers", "__dict__")
            for name, value in getattr(self, kind).items()
            if isinstance(value, Tensor) and name not in _SHARED
        ]

    def reset_parameters(self) -> None:
        """Give each layer's part its initial values."""

        def alone(parts: Sequence[Tensor]) -> Sequence[Tensor]:
            return [nn.Parameter(part.detach()) for part in parts]

        for view in _views(self, alone):
            view.reset_parameters()


def stacked(modules: Sequence[Any], flat: bool = False) -> Any:
    """The first of these, with the values of all, which must be of one kind and options.

    With `flat`, what is `(1,)` in each becomes `(E,)`.
    """
    first = modules[0]
    if first._modules:
        raise TokenGateError(
            f"{type(first).__name__} holds modules of its own, which cannot be stacked over "
            "experts: give it parameters by new_parameter, or patch other layers."
        )

    def together(tensors: list[Tensor]) -> Tensor:
        single = flat and tensors[0].shape == (1,)
        return torch.cat(tensors) if single else torch.stack(tensors)

    for name, parameter in list(first._parameters.items()):
        values = together([module._parameters[name].detach() for module in modules])
        first._parameters[name] = nn.Parameter(values, parameter.requires_grad)
    for kind in ("_buffers", "__dict__"):
        own = getattr(first, kind)
        for name in [name for name, value in own.items() if isinstance(value, Tensor)]:
            own[name] = together([getattr(module, kind)[name] for module in modules])
    swap(first, Stacked)
    first.layers, first.flat = len(modules), flat
    return first


def parts_beside(
    layer: Any, make: Callable[[Any], tuple[nn.Module, nn.Module | None]]
) -> tuple[Any, Any]:
    """The modification and gate that are made beside a layer; of experts all of theirs, stacked."""
    if not isinstance(layer, StackedLinear):
        return make(layer)
    modifications, gates = zip(*map(make, layer.each()), strict=True)
    return stacked(modifications), None if gates[0] is None else stacked(gates, flat=True)


def _views(module: Any, each: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> list[Any]:
    """One for each layer, with parts of the tensors of all of them."""

    def parts(tensors: Any) -> dict[str, Sequence[Tensor]]:
        return {
            name: torch.split(t, 1) if module.flat and t.dim() == 1 else t.unbind(0)
            for name, t in tensors.items()
            if isinstance(t, Tensor) and name not in _SHARED
        }

    parameters = {name: each(own) for name, own in parts(module._parameters).items()}
    buffers, kept = parts(module._buffers), parts(module.__dict__)
    views = []
    for layer in range(module.layers):
        view: Any = object.__new__(module._own_class)
        view.__dict__ |= module.__dict__ | {name: own[layer] for name, own in kept.items()}
        view.__dict__["_parameters"] = {name: own[layer] for name, own in parameters.items()}
        view.__dict__["_buffers"] = {name: own[layer] for name, own in buffers.items()}
        views.append(view)
    return views
