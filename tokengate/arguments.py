"""Checks of the values a user passes, each of them one sentence when it fails."""

from __future__ import annotations

import difflib
import numbers
import re
from collections.abc import Iterable
from typing import Any

from tokengate.errors import TokenGateError, brief

_LARGEST = 3.4e38


def finite(name: str, value: float) -> float:
    """`value` as a float, if it is a real number that float32 can hold."""
    # bool is a Real to Python, but `scale=True` is a slip, not a number.
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and -_LARGEST <= value <= _LARGEST):
        raise TokenGateError(
            f"{name}={brief(value)} is not a finite number of float32: pass one, e.g. 0.5."
        )
    return float(value)


def non_negative(name: str, value: float) -> float:
    """`value` as a float, if it is finite and >= 0."""
    number = finite(name, value)
    if number < 0:
        raise TokenGateError(f"{name}={brief(value)} is negative: pass a number >= 0.")
    return number


def positive(name: str, value: float) -> float:
    """`value` as a float, if it is finite and > 0."""
    number = finite(name, value)
    if number <= 0:
        raise TokenGateError(f"{name}={brief(value)} is not above 0: pass a number > 0.")
    return number


def share(name: str, value: float) -> float:
    """`value` as a float, if it lies in [0, 1)."""
    number = finite(name, value)
    if not 0 <= number < 1:
        raise TokenGateError(
            f"{name}={brief(value)} is not in [0, 1): pass a share, e.g. {name}=0.1."
        )
    return number


def count(name: str, value: int, least: int = 1) -> int:
    """`value` as an int, if it is a whole number >= `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise TokenGateError(
            f"{name}={brief(value)} is not a whole number >= {least}: pass e.g. {name}=8."
        )
    return int(value)


def switch(name: str, value: bool) -> bool:
    """`value`, if it is True or False."""
    if not isinstance(value, bool):
        raise TokenGateError(f"{name}={brief(value)} is neither True nor False: pass one of them.")
    return value


def choice(name: str, value: str, choices: Iterable[str]) -> str:
    """The one of `choices` that `value` is, however it is spelled."""
    names = list(choices)
    found = spelled(value, names)
    if found is None:
        raise TokenGateError(
            f"{name}={brief(value)} is unknown{did_you_mean(value, names)}: choose one of "
            f"{', '.join(names)}."
        )
    return found


def spelled(word: Any, words: Iterable[str]) -> str | None:
    """The one of `words` that is `word`, or is but for case, hyphens and spaces; None if none is.

    So are "LoRA", "all_linear" and "Lowest" right.
    """
    known = list(words)
    if not isinstance(word, str) or word in known:
        return word if isinstance(word, str) else None
    alike = [each for each in known if _bare(each) == _bare(word)]
    return alike[0] if len(alike) == 1 else None


def did_you_mean(word: Any, words: Iterable[str]) -> str:
    """The nearest of `words`, as a part of a sentence; empty where none is near."""
    known = {each.casefold(): each for each in words}
    near = difflib.get_close_matches(str(word).casefold(), known, n=1)
    return f" (did you mean {known[near[0]]!r}?)" if near else ""


def _bare(word: str) -> str:
    return re.sub(r"[\s_-]", "", word).casefold()


def betas(value: tuple[float, float]) -> tuple[float, float]:
    """Adam's two decay rates, each in [0, 1)."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise TokenGateError(
            f"betas={brief(value)} is not a pair of numbers: pass e.g. betas=(0.9, 0.98)."
        ) from None
    return share("betas[0]", first), share("betas[1]", second)
