"""Giving an existing module another class, and its own back: nothing is wrapped or copied."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import nn

from tokengate.linears.accelerate_hooks import reroute

_Swapped = TypeVar("_Swapped", bound="Swapped")


class Swapped(nn.Module):
    """A module that was given this class; never constructed."""

    _own_class: ClassVar[type[nn.Module]]
    _given: ClassVar[type[Swapped]]

    def __init_subclass__(cls, **options: Any) -> None:
        # Whoever lists the classes that are written below its own means no class made here.
        pass

    @classmethod
    def _members_for(cls, own_class: type[nn.Module]) -> dict[str, Any]:
        """What a class made of this one and `own_class` has of its own."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made here cannot be found by its name: it is made again when unpickling.
        given, own = _taken_apart(type(self))
        reduced: Any = own.__reduce_ex__(self, protocol)
        function, arguments, *rest = reduced
        arguments = tuple(own if each is type(self) else each for each in arguments)
        state = [self._kept_by_copies(each) for each in rest[:1]]
        return _remade, (given, function, arguments), *state, *rest[1:]

    def _kept_by_copies(self, state: Any) -> Any:
        return state


def own_class(module: nn.Module) -> type[nn.Module]:
    """Its class under all that it was given here."""
    return _taken_apart(type(module))[1]


def swap(module: nn.Module, given: type[Swapped]) -> None:
    """Put `given` before the class of `module`: its methods win, `super()` is the module's own."""
    become(module, swapped_class(given, type(module)))


def swap_back(module: Swapped) -> None:
    """Give `module` its own class back, under what was derived of ours since, as by parametrize."""
    own, kind = module._own_class, type(module)
    if "_own_class" not in vars(kind):
        ours = kind.__mro__[1].__name__
        derived = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        own = type(kind.__name__.replace(ours, own.__name__), (own,), derived)
    become(module, own)


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give `module` the class `kind`, and what hooks keep of its forward, too."""
    before = type(module)
    module.__class__ = kind
    reroute(module, before)


_MADE: dict[tuple[type[Swapped], type[nn.Module]], type[Swapped]] = {}


def swapped_class(given: type[_Swapped], own_class: type[nn.Module]) -> type[_Swapped]:
    """`given` if it was written for `own_class`, else a class made of both."""
    if getattr(given, "_own_class", None) is own_class:
        return given
    key = (given, own_class)
    if key not in _MADE:
        members = {"_own_class": own_class, "_given": given, **given._members_for(own_class)}
        # Gated for Linear8bitLt is GatedLinear8bitLt.
        name = given.__name__.removesuffix("Linear") + own_class.__name__
        name = members.pop("__name__", name)
        made = type(name, key, members)
        if not _can_become(own_class, made):  # whose first base is no module, as ABC
            made = type(name, (own_class, given), members)
        _MADE[key] = made
    return _MADE[key]  # type: ignore[return-value]


def _can_become(own_class: type[nn.Module], made: type[nn.Module]) -> bool:
    try:
        object.__setattr__(object.__new__(own_class), "__class__", made)
    except TypeError:
        return False
    return True


def _taken_apart(kind: type[nn.Module]) -> tuple[list[type[Swapped]], type[nn.Module]]:
    """What was given, the last first, and the class that the module had before."""
    given = []
    while issubclass(kind, Swapped):
        given.append(getattr(kind, "_given", kind))
        kind = kind._own_class
    return given, kind


def _remade(given: list[type[Swapped]], function: Any, arguments: Any) -> nn.Module:
    made: nn.Module = function(*arguments)
    for each in reversed(given):
        made.__class__ = swapped_class(each, type(made))
    return made
