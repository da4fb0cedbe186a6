"""Kinds of things by name, gates here and methods above, and the options each kind takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from tokengate.arguments import did_you_mean, spelled
from tokengate.errors import TokenGateError, brief
from tokengate.gates.base import Gate
from tokengate.gates.stacked import Stacked

_Base = TypeVar("_Base")
_Kind = TypeVar("_Kind", bound=type)


class Registry(Generic[_Base]):
    """The subclasses of one class that a user can ask for by name.

    Args:
        base: that class.
        what: how it is called in sentences, and as an argument of `patch`.
        decorator: the public name of `register`.

    Attributes:
        kinds: the classes, by name.
    """

    def __init__(self, base: type[_Base], what: str, decorator: str) -> None:
        self._base, self._what, self.decorator = base, what, decorator
        self.kinds: dict[str, type[_Base]] = {}

    def register(self, name: str) -> Callable[[_Kind], _Kind]:
        """Class decorator: make the class available by this name.

        Raises:
            TokenGateError: it is no subclass, or the name belongs to another class.
        """
        if not isinstance(name, str) or not name:
            raise TokenGateError(
                f"{self.decorator} was given {brief(name)} as a name: decorate with "
                f'@tokengate.{self.decorator}("my_{self._what}").'
            )

        def add(kind: _Kind) -> _Kind:
            if not (isinstance(kind, type) and issubclass(kind, self._base)):
                raise TokenGateError(
                    f"{self.decorator}({name!r}) was given {kind!r}: decorate a subclass of "
                    f"tokengate.{self._base.__name__}."
                )
            known = self.kinds.get(name)
            # The same class once more is a module reloaded, as notebooks do.
            if known is not None and _place(known) != _place(kind):
                raise TokenGateError(
                    f"{self._what} {name!r} is taken by {known.__qualname__}: choose another name."
                )
            self.kinds[name] = kind
            return kind  # type: ignore[return-value]

        return add

    def find(self, asked: Any) -> type[_Base]:
        """The class behind a name; a subclass stands for itself."""
        if isinstance(asked, type) and issubclass(asked, self._base):
            return asked
        name = spelled(asked, self.kinds)
        if name is None:
            hint = did_you_mean(asked, self.kinds)
            raise TokenGateError(
                f"unknown {self._what} {brief(asked)}{hint}: choose one of "
                f"{', '.join(sorted(self.kinds))}, or pass a subclass of "
                f"tokengate.{self._base.__name__}."
            )
        return self.kinds[name]

    def check_saved(self, name: str, folder: object) -> None:
        """An error if what an adapter's `folder` speaks of is not known here.

        Raises:
            TokenGateError: nobody has registered it in this process.
        """
        if spelled(name, self.kinds) is None:
            raise TokenGateError(
                f"the adapter in {str(folder)!r} was made with {self._what} {brief(name)}, which "
                "is unknown here: before it is loaded, import what registers it, by "
                f"@tokengate.{self.decorator}({brief(name)}); those known are "
                f"{', '.join(sorted(self.kinds))}."
            )

    def name_of(self, kind: type[_Base]) -> str | None:
        """The name by which `find` finds just this class; None if there is none."""
        kind = one_of(kind)
        return next((name for name, known in self.kinds.items() if known is kind), None)


def options_of(kind: type) -> dict[str, Any]:
    """The keyword-only arguments of `__init__`, and with `**options` those that it extends.

    With their defaults. A class may say itself which they are, as `option_defaults`.
    """
    declared: dict[str, Any] | None = getattr(kind, "option_defaults", None)
    if declared is not None:
        return dict(declared)
    names: dict[str, Any] = {}
    for cls in kind.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        names = {**names, **{name: own[name] for name in own if name not in names}}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def check_options(kind: type, options: Iterable[str], beside: Iterable[str] = ()) -> None:
    """An error, which names the valid ones, if `kind` does not have one of the options.

    What is `beside` them, as arguments of the caller's own, may have been meant.
    """
    valid = options_of(kind)
    unknown = [name for name in options if name not in valid]
    if unknown:
        hint = did_you_mean(unknown[0], [*valid, *beside])
        raise TokenGateError(
            f"unknown option {unknown[0]!r} for {kind.__name__}{hint}: its options are "
            f"{', '.join(valid) or 'none'}."
        )


def one_of(kind: Any) -> Any:
    """The class of one layer's, where `kind` is that of several stacked ones."""
    return kind._own_class if issubclass(kind, Stacked) else kind


def with_defaults(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the defaults of those that are not given."""
    kind = one_of(kind)
    return {**options_of(kind), **options}


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


GATES: Registry[Gate] = Registry(Gate, "gate", "register_gate")


def register_gate(name: str) -> Callable[[_Kind], _Kind]:
    """Class decorator: make a `Gate` available as `patch(..., gate=name)`.

    Raises:
        TokenGateError: the class is no `Gate`, or the name belongs to another class.
    """
    return GATES.register(name)
