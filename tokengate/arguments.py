"""Checks of the values a user passes, each of them one sentence when it fails."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from tokengate.errors import TokenGateError, brief

_LARGEST = 3.4e38
_Function = TypeVar("_Function", bound=Callable[..., Any])


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


def share(name: str, value: float, *, whole: bool = False) -> float:
    """`value` as a float, if it lies in [0, 1), or is 1 where that may be `whole`."""
    number = finite(name, value)
    if not (0 <= number < 1 or (whole and number == 1)):
        end = "]" if whole else ")"
        raise TokenGateError(
            f"{name}={brief(value)} is not in [0, 1{end}: pass a share, e.g. {name}=0.1."
        )
    return number


def wanted_sparsity(name: str, value: float) -> float:
    """`value` as a float, if a training can be led there: some are closed, and some are not."""
    number = finite(name, value)
    if not 0 < number < 1:
        raise TokenGateError(
            f"{name}={brief(value)} is not between 0 and 1: pass the share of positions that is to "
            "be left unmodified, e.g. 0.6."
        )
    return number


def count(name: str, value: int, least: int = 1) -> int:
    """`value` as an int, if it is a whole number >= `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise TokenGateError(
            f"{name}={brief(value)} is not a whole number >= {least}: pass e.g. {name}=8."
        )
    return int(value)


def function(name: str, value: Any, *takes: str, example: str) -> None:
    """An error if `value` cannot be called with as many arguments, which are named for it."""
    try:
        inspect.signature(value).bind(*takes)
    except ValueError:
        pass  # built in, with a signature that nobody knows
    except TypeError:
        raise TokenGateError(
            f"{name}={brief(value)} is no function of {' and '.join(takes)}: pass e.g. "
            f"{name}={example}."
        ) from None


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


def unused(asked: str, where: str, **given: Any) -> None:
    """An error if one of the arguments was given, that is, is not None: nothing would use it.

    Args:
        asked: the function that was called, for the error.
        where: what the others say, so that it has no effect, e.g. "with gate=False".
        given: by name, as the caller gave them.
    """
    for name, value in given.items():
        if value is not None:
            raise TokenGateError(
                f"{asked} was given {name}={brief(value)}, which has no effect {where}: leave it "
                "out."
            )


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


def check_word(
    asked: str, name: str, value: Any, same: Mapping[str, str], otherwise: Mapping[str, str]
) -> None:
    """An error if an argument's `name` is another library's word for what `asked` takes.

    Args:
        asked: the function that was called, for the error.
        name: of the argument that it does not have.
        value: of it.
        same: what is the same here by another name.
        otherwise: of what is said in another way, the end of the sentence.
    """
    shown = brief(value)
    if name in same:
        raise TokenGateError(
            f"{asked} was given {name}={shown}, which is called {same[name]} here: did you mean "
            f"{same[name]}={shown}?"
        )
    if name in otherwise:
        raise TokenGateError(
            f"{asked} was given {name}={shown}, which is no option here: {otherwise[name]}."
        )


def in_our_words(
    same: Mapping[str, str] | None = None, otherwise: Mapping[str, str] | None = None
) -> Callable[[_Function], _Function]:
    """For a function whose arguments others call differently: see `check_word`.

    It answers names that neither it nor others have, too, and more arguments than it takes by
    position, each in a sentence. Of a class, decorate its `__init__`.
    """

    def decorate(function: _Function) -> _Function:
        asked = function.__qualname__.removesuffix(".__init__")
        parameters = inspect.signature(function).parameters
        ours = [name for name in parameters if name != "self"]
        places = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in [each for each in kwargs if each not in parameters]:
                check_word(asked, name, kwargs[name], same or {}, otherwise or {})
                raise TokenGateError(
                    f"{asked} was given {name}={brief(kwargs[name])}, which is no option of it"
                    f"{did_you_mean(name, ours)}: its options are {', '.join(ours)}."
                )
            if len(args) > len(places):
                taken = " and ".join(place for place in places if place != "self")
                raise TokenGateError(
                    f"{asked} was given {brief(args[len(places)])} beside {taken}, which are all "
                    "that it takes by position: leave it out, or name it."
                )
            return function(*args, **kwargs)

        return cast(_Function, checked)

    return decorate


def betas(value: tuple[float, float]) -> tuple[float, float]:
    """Adam's two decay rates, each in [0, 1)."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise TokenGateError(
            f"betas={brief(value)} is not a pair of numbers: pass e.g. betas=(0.9, 0.98)."
        ) from None
    return share("betas[0]", first), share("betas[1]", second)
