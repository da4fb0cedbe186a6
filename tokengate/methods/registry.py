"""Methods by name."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

from torch import nn

from tokengate.arguments import positive
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
    """The modification of `linear`, with its initial values.

    Raises:
        TokenGateError: an option is out of range. Of a scale that is more than of a loaded one,
            which may have been set to what takes back what was trained.
    """
    modification = method(linear, **options)
    if isinstance(scale := options.get("scale"), Real):
        positive("scale", float(scale))
    modification.options = options
    modification.reset_parameters()
    return modification
