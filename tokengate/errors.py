"""The one error this library raises for what a user asked of it."""

from typing import Any


class TokenGateError(ValueError):
    """What was asked cannot be done.

    The message is one sentence: what was asked, what was found, what to do. Whatever
    was to be changed is as it was.
    """


def brief(value: Any) -> str:
    """`value` as it fits a sentence: on one line, and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
