"""JSON that says one thing: numbers that a machine has, and no key twice; of no boundless size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tokengate.errors import TokenGateError, brief
from tokengate.files.regular import read_text

# A report with the shares of a million samples in hundreds of modules is of this size, in bytes.
_MOST = 1 << 30
# More digits than any number of 64 bits, and its sign.
_DIGITS = 20


def read(path: str | Path, what: str) -> dict[str, Any]:
    """The JSON object in a file that holds a `what`: see `parse`.

    Raises:
        TokenGateError: the file cannot be read, or holds something else.
    """
    try:
        text = read_text(path, _MOST)
    except (OSError, UnicodeDecodeError, MemoryError) as error:
        raise TokenGateError(
            f"{path} could not be read ({brief(str(error))}): pass the path of a saved {what}."
        ) from None
    return parse(text, str(path), what)


def parse(
    text: str, where: str, what: str = "adapter", values: int | None = None
) -> dict[str, Any]:
    """A JSON object, of finite numbers and without a key twice.

    Args:
        text: of a file.
        where: that file, for the error.
        what: it holds, for the error.
        values: how many it may hold at most; each of them takes more memory than its text.

    Raises:
        TokenGateError: it is something else; a whole number is beyond 64 bits, so that no float
            or tensor need hold it.
    """
    if values is not None and text.count(",") + text.count("[") + text.count("{") > values:
        raise TokenGateError(
            f"{where} holds more than {values:,} values, as no {what} does: save the {what} again."
        )
    try:
        found = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_of_64_bits,
            object_pairs_hook=_unique,
        )
        if "\\ud" in text or "\\uD" in text:  # half of a pair, which is no character
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError, MemoryError) as error:
        raise TokenGateError(
            f"{where} is no JSON that could be read ({brief(str(error))}): save the {what} again."
        ) from None
    if not isinstance(found, dict):
        raise TokenGateError(
            f"{where} holds {brief(found)} instead of an object: save the {what} again."
        )
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e999
        raise ValueError("a number is not finite")
    return number


def _of_64_bits(text: str) -> int:
    if len(text) <= _DIGITS and -(1 << 63) <= (number := int(text)) < 1 << 63:
        return number
    raise ValueError("a whole number has more than 64 bits")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found
