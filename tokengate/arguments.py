"""Checks of the numbers a user passes, each of them one sentence when it fails."""

from __future__ import annotations

import numbers

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


def count(name: str, value: int) -> int:
    """`value` as an int, if it is a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise TokenGateError(
            f"{name}={brief(value)} is not a whole number >= 1: pass e.g. {name}=8."
        )
    return int(value)


def betas(value: tuple[float, float]) -> tuple[float, float]:
    """Adam's two decay rates, each in [0, 1)."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise TokenGateError(
            f"betas={brief(value)} is not a pair of numbers: pass e.g. betas=(0.9, 0.98)."
        ) from None
    return share("betas[0]", first), share("betas[1]", second)
