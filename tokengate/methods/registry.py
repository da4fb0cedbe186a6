"""Methods by name."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

from torch import nn

from tokengate.errors import TokenGateError, brief
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
        TokenGateError: an option is out of range, or would let nothing be trained.
    """
    modification = method(linear, **options)
    scale = options.get("scale")
    if isinstance(scale, Real) and scale == 0:
        raise TokenGateError(
            f"scale={brief(scale)} was given, with which M(x) is 0 whatever is trained: pass "
            "another number, e.g. 0.5."
        )
    modification.options = options
    modification.reset_parameters()
    return modification
