"""Classes of other libraries, known by name: importing those would cost what most do not use."""

from __future__ import annotations


def is_from(thing: object, library: str, name: str | None = None) -> bool:
    """Whether `thing` is an instance of the class `name` of `library`; of any of its classes."""
    return any(
        kind.__module__.startswith(f"{library}.") and name in (None, kind.__name__)
        for kind in type(thing).__mro__
    )
