"""Methods by name, and the options each one takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.methods.base import Modification

_Method = TypeVar("_Method", bound=type[Modification])
_METHODS: dict[str, type[Modification]] = {}


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator: make a `Modification` available as `patch(..., method=name)`.

    Raises:
        TokenGateError: the class is no `Modification`, or the name belongs to another class.
    """

    if not isinstance(name, str) or not name:
        raise TokenGateError(
            f"register was given {brief(name)} as a name: decorate with "
            '@tokengate.register("my_method").'
        )

    def add(method: _Method) -> _Method:
        if not (isinstance(method, type) and issubclass(method, Modification)):
            raise TokenGateError(
                f"register({name!r}) was given {method!r}: decorate a subclass of "
                "tokengate.Modification."
            )
        known = _METHODS.get(name)
        # The same class once more is a module reloaded, as notebooks do.
        if known is not None and _place(known) != _place(method):
            raise TokenGateError(
                f"method {name!r} is taken by {known.__qualname__}: choose another name."
            )
        _METHODS[name] = method
        return method

    return add


def _place(method: type) -> tuple[str, str]:
    return method.__module__, method.__qualname__


def find_method(method: str | type[Modification]) -> type[Modification]:
    """The class behind a method's name; a `Modification` subclass stands for itself."""
    if isinstance(method, type) and issubclass(method, Modification):
        return method
    if not isinstance(method, str) or method not in _METHODS:
        hint = _did_you_mean(str(method), _METHODS)
        raise TokenGateError(
            f"unknown method {brief(method)}{hint}: choose one of {', '.join(sorted(_METHODS))}, "
            "or pass a subclass of tokengate.Modification."
        )
    return _METHODS[method]


def check_options(method: type[Modification], options: Iterable[str]) -> None:
    """An error, which names the valid ones, if `method` does not have one of the options."""
    valid = _options_of(method)
    unknown = [name for name in options if name not in valid]
    if unknown:
        hint = _did_you_mean(unknown[0], valid)
        raise TokenGateError(
            f"unknown option {unknown[0]!r} for {method.__name__}{hint}: its options are "
            f"{', '.join(valid) or 'none'}."
        )


def _options_of(method: type[Modification]) -> dict[str, Any]:
    """The keyword-only arguments of `__init__`, and with `**options` those that it extends.

    With their defaults.
    """
    names: dict[str, Any] = {}
    for cls in method.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        names = {**names, **{name: own[name] for name in own if name not in names}}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def build(method: type[Modification], linear: nn.Linear, options: dict[str, Any]) -> Modification:
    """The modification of `linear`, with its initial values."""
    modification = method(linear, **options)
    modification.options = dict(options)
    modification.reset_parameters()
    return modification


def name_of(method: type[Modification]) -> str | None:
    """The name by which `find_method` finds just this class; None if there is none."""
    return next((name for name, known in _METHODS.items() if known is method), None)


def with_defaults(method: type[Modification], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the defaults of those that are not given."""
    return {**_options_of(method), **options}
