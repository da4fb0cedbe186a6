"""Methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from tokengate.gates.registry import Registry
from tokengate.methods.base import Modification

_Method = TypeVar("_Method", bound=type[Modification])
METHODS: Registry[Modification] = Registry(Modification, "method", "register")


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator: make a `Modification` available as `patch(..., method=name)`.

    Raises:
        TokenGateError: the class is no `Modification`, or the name belongs to another class.
    """
    return METHODS.register(name)


def build(method: type[Modification], linear: nn.Linear, options: dict[str, Any]) -> Modification:
    """The modification of `linear`, with its initial values."""
    modification = method(linear, **options)
    modification.options = options
    modification.reset_parameters()
    return modification
