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

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made here cannot be found by its name: it is made again when unpickling.
        given = getattr(self, "_given", type(self))
        return _blank, (given, self._own_class), self._kept_by_copies()

    def _kept_by_copies(self) -> dict[str, Any]:
        return self.__dict__


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
        # Gated for Linear8bitLt is GatedLinear8bitLt.
        name = given.__name__.removesuffix("Linear") + own_class.__name__
        _MADE[key] = type(name, key, {"_own_class": own_class, "_given": given})
    return _MADE[key]  # type: ignore[return-value]


def _blank(given: type[Swapped], own_class: type[nn.Module]) -> Swapped:
    cls = swapped_class(given, own_class)
    return cls.__new__(cls)
