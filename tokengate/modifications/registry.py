"""Methods by name, and the options each one takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.modifications.base import Modification

_Method = TypeVar("_Method", bound=type[Modification])
_METHODS: dict[str, type[Modification]] = {}


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator: make a `Modification` available as `patch(..., method=name)`.

    Raises:
        TokenGateError: the class is no `Modification`, or the name belongs to another class.
    """

    def add(method: _Method) -> _Method:
        if not (isinstance(method, type) and issubclass(method, Modification)):
            raise TokenGateError(
                f"register({name!r}) was given {method!r}: decorate a subclass of "
                "tokengate.Modification."
            )
        known = _METHODS.get(name)
        # The same class once more is a module reloaded, as notebooks do.
        if known is not None and known.__qualname__ != method.__qualname__:
            raise TokenGateError(
                f"method {name!r} is taken by {known.__qualname__}: choose another name."
            )
        _METHODS[name] = method
        return method

    return add


def find_method(method: str | type[Modification]) -> type[Modification]:
    """The class behind a method's name; a `Modification` subclass stands for itself."""
    if isinstance(method, type) and issubclass(method, Modification):
        return method
    if not isinstance(method, str) or method not in _METHODS:
        near = difflib.get_close_matches(str(method), _METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TokenGateError(
            f"unknown method {brief(method)}{hint}: choose one of {', '.join(sorted(_METHODS))}, "
            "or pass a subclass of tokengate.Modification."
        )
    return _METHODS[method]


def build(method: type[Modification], linear: nn.Linear, options: dict[str, Any]) -> Modification:
    """The modification of `linear`, with its initial values."""
    valid = [
        name
        for name, parameter in inspect.signature(method.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise TokenGateError(
            f"unknown option {unknown[0]!r} for {method.__name__}: its options are "
            f"{', '.join(valid) or 'none'}."
        )
    modification = method(linear, **options)
    modification.reset_parameters()
    return modification
