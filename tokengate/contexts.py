"""Contexts that say so when nobody enters them: a call without `with` does nothing, silently."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

from tokengate.errors import TokenGateError, UnenteredContextWarning

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


class _NotEntered(TokenGateError, AttributeError):
    """What only the object behind `as` has was asked of the context itself."""


class Waiting:
    """A context that warns if it goes before it was entered."""

    _waits = False
    """From when it is made to `__enter__`; a subclass sets it."""
    _called = ""
    """By what."""

    def __del__(self) -> None:
        if self._waits and not sys.is_finalizing():
            warnings.warn(f"{self._without()}.", UnenteredContextWarning, stacklevel=2)

    def _without(self) -> str:
        name = self._called
        return (
            f"{name}(model) was called without `with`, so that it did nothing: write "
            f"`with {name}(model, ...):` around what it is meant for"
        )


class _Context(Waiting, contextlib._GeneratorContextManager):  # type: ignore[type-arg]
    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        super().__init__(function, args, kwargs)
        self._called, self._waits = function.__name__, True

    def __enter__(self) -> Any:
        self._waits = False
        return super().__enter__()

    def __call__(self, function: Any) -> Any:
        self._waits = False  # a decorator, which makes a new one for each call
        return super().__call__(function)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._waits = False  # said here
        raise _NotEntered(
            f"{name} was asked of a context: {self._without()}, and ask what `as` gives."
        )


def context(
    function: Callable[_Given, Iterator[_Made]],
) -> Callable[_Given, AbstractContextManager[_Made]]:
    """As `contextlib.contextmanager`, for what users call."""

    @functools.wraps(function)
    def make(*args: _Given.args, **kwargs: _Given.kwargs) -> AbstractContextManager[_Made]:
        return _Context(function, args, kwargs)

    return make
