"""The modifications, or the gates, of several layers in one module: each parameter a stack.

They are made one by one, as those of single layers are, and then hold their values together:
`(E, r, k)` in place of E times `(r, k)`, and `(E,)` where each has a single number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.linears.class_swap import Swapped, swap


class Stacked(Swapped):
    """What a module of one layer becomes, once it has the values of several; see `stacked`."""

    layers: int

    @classmethod
    def _members_for(cls, own_class: type[nn.Module]) -> dict[str, Any]:
        return {"__name__": own_class.__name__, "__doc__": own_class.__doc__}

    def each(self) -> list[Any]:
        """The modules of its layers, as views through which gradients flow."""
        return _views(self, _parts)

    def reset_parameters(self) -> None:
        """Give each layer's part its initial values."""

        def alone(p: Tensor) -> Sequence[Tensor]:
            return [nn.Parameter(part) for part in _parts(p.detach())]

        for view in _views(self, alone):
            view.reset_parameters()


def stacked(modules: Sequence[Any]) -> Any:
    """The first of these, with the values of all, which must be of one kind and options."""
    first = modules[0]
    for name, parameter in list(first._parameters.items()):
        each = [module._parameters[name] for module in modules]
        together = _together([p.detach() for p in each])
        first._parameters[name] = nn.Parameter(together, parameter.requires_grad)
    for name in list(first._buffers):
        first._buffers[name] = _together([module._buffers[name] for module in modules])
    for name, value in list(first.__dict__.items()):
        if isinstance(value, Tensor):
            first.__dict__[name] = _together([module.__dict__[name] for module in modules])
    if first._modules:
        raise TokenGateError(
            f"{type(first).__name__} holds modules of its own, which cannot be stacked over "
            "experts: give it parameters by new_parameter, or patch other layers."
        )
    swap(first, Stacked)
    first.layers = len(modules)
    return first


def _together(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts[0].shape == (1,) else torch.stack(parts)


def _views(module: Any, apart: Callable[[Tensor], Sequence[Tensor]]) -> list[Any]:
    """One for each layer, with parts of the tensors of all of them."""
    own = module._own_class
    parameters = {name: apart(p) for name, p in module._parameters.items()}
    buffers = {name: _parts(b) for name, b in module._buffers.items()}
    kept = {n: _parts(v) for n, v in module.__dict__.items() if isinstance(v, Tensor)}
    kept.pop("_tally", None)  # which all of them add to
    views = []
    for layer in range(module.layers):
        view: Any = object.__new__(own)
        view.__dict__ |= module.__dict__
        view.__dict__ |= {name: parts[layer] for name, parts in kept.items()}
        view.__dict__["_parameters"] = {name: p[layer] for name, p in parameters.items()}
        view.__dict__["_buffers"] = {name: b[layer] for name, b in buffers.items()}
        views.append(view)
    return views


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.unbind(0) if tensor.dim() > 1 else torch.split(tensor, 1)
