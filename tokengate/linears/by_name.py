"""Classes of other libraries, known by name: importing those would cost what most do not use."""

from __future__ import annotations


def class_names(thing: object) -> list[str]:
    """The full names of its class and of those that this inherits from."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(thing).__mro__]


def is_from(thing: object, library: str, name: str) -> bool:
    """Whether `thing` is an instance of the class `name` of `library`."""
    return any(
        kind.__name__ == name and kind.__module__.startswith(f"{library}.")
        for kind in type(thing).__mro__
    )
