"""JSON that says one thing: finite numbers, and no key twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tokengate.errors import TokenGateError, brief


def read(path: str | Path, what: str) -> dict[str, Any]:
    """The JSON object in a file that holds a `what`: see `parse`.

    Raises:
        TokenGateError: the file cannot be read, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenGateError(
            f"{path} could not be read ({brief(str(error))}): pass the path of a saved {what}."
        ) from None
    return parse(text, str(path), what)


def parse(text: str, where: str, what: str = "adapter") -> dict[str, Any]:
    """A JSON object, of finite numbers and without a key twice.

    Args:
        text: of a file.
        where: that file, for the error.
        what: it holds, for the error.

    Raises:
        TokenGateError: it is something else.
    """
    try:
        found = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    for value in found.values():
        if isinstance(value, float) and not math.isfinite(value):  # 1e999
            raise ValueError("a number is not finite")
    return found
