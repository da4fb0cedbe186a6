"""Patterns over dotted names: what `targets=`, `exclude=`, `train=` and dicts of options use."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from tokengate.errors import TokenGateError, brief

Pattern: TypeAlias = str | re.Pattern[str]


# What makes a glob of a string.
_WILD = "*?["


class FullName(str):
    """A module's full name, as a pattern that means this module alone.

    As any other string `"layers.0.fc"` would also mean `"encoder.layers.0.fc"`.
    """

    __slots__ = ()


def matches(pattern: Pattern, name: str) -> bool:
    """Whether the dotted `name` is meant by `pattern`.

    A compiled regular expression matches the full name; a string with `*`, `?` or `[` is a glob
    over the full name; any other string is the name or a suffix of whole components:
    `"q_proj"` means `"layers.0.q_proj"`, not `"layers.0.seq_proj"`; a `FullName` is no suffix.
    """
    if isinstance(pattern, FullName):
        return name == pattern
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if not is_literal(pattern):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def is_literal(pattern: Pattern) -> bool:
    """Whether it is a name, or the end of one, and no glob or regular expression."""
    return isinstance(pattern, str) and (
        isinstance(pattern, FullName) or not any(character in pattern for character in _WILD)
    )


def is_one_word(pattern: Pattern) -> bool:
    """Whether it is a name of a single component."""
    return is_literal(pattern) and not isinstance(pattern, FullName) and "." not in str(pattern)


def as_patterns(argument: str, value: Any) -> list[Pattern]:
    """`value` as a list of patterns; one pattern stands for a list of one."""
    if isinstance(value, Mapping):
        raise TokenGateError(
            f"{argument}={brief(value)} is a dict, and nothing would use its values: pass its keys "
            f"as a list, {argument}={brief([*value])}, and an option that differs from layer to "
            'layer as a dict of its own, e.g. patch(rank={"*.q_proj": 16, "*": 8}).'
        )
    if isinstance(value, (str, re.Pattern)):
        value = [value]
    try:
        patterns = list(value)
    except TypeError:
        patterns = [None]
    for pattern in patterns:
        text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        nothing = text == "" and not isinstance(text, FullName)  # the model itself has no name
        if not isinstance(text, str) or nothing:
            raise TokenGateError(
                f"{argument}={brief(value)} is not a list of names: pass names, globs or compiled "
                'regular expressions, e.g. ["q_proj", "*.v_proj"].'
            )
    return patterns


def show(pattern: Pattern) -> str:
    """The pattern as the user wrote it."""
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


def nearest(pattern: Pattern, names: Iterable[str]) -> str:
    """The names that come closest to a pattern that matched nothing, as the end of a sentence.

    Or what the pattern was meant for, where it is a string that names nothing as it is.
    """
    names = list(names)
    if isinstance(pattern, str) and (meant := _meant(pattern, names)):
        return meant
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    # Layers of a model repeat: compare with names and with their last components.
    candidates: dict[str, None] = {}
    for name in names:
        candidates.update({name.rpartition(".")[2]: None, name: None})
    near = difflib.get_close_matches(text, candidates, n=4, cutoff=0.5) or list(candidates)[:4]
    return f"the nearest names are {', '.join(near)}" if near else "it has none"


def _meant(text: str, names: Collection[str]) -> str | None:
    """How a string would match: as a list of names, or as a regular expression."""
    parts = [part.strip("[]'\" ") for part in text.split(",")]
    if len(parts) > 1 and all(any(matches(part, name) for name in names) for part in parts):
        return f"names come as a list, {parts!r}"
    try:
        expression = re.compile(text)
    except re.error:
        return None
    hits = [name for name in names if expression.fullmatch(name)]
    if not hits:  # as PEFT's lists, and people, mean it
        hits = [name for name in names if expression.fullmatch(name.rpartition(".")[2])]
        text = rf"(.*\.)?({text})"
    if not hits:
        return None
    quoted = f"r'{text}'" if "'" not in text else repr(text)
    return (
        f"strings are names and globs, and as a regular expression, re.compile({quoted}), it "
        f"would match {len(hits)}, e.g. {hits[0]}"
    )
