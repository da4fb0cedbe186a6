"""The one error this library raises for what a user asked of it, and its warnings."""

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


class UnreachedLayerWarning(UserWarning):
    """A patched layer was not called in the first forward of its model."""


class MixedPositionsWarning(UserWarning):
    """A layer was patched that mixes tokens or heads, so that its positions are no tokens."""


class SkippedModuleWarning(UserWarning):
    """A target matched other modules beside linear layers, which stay as they are."""


class DifferentBaseWarning(UserWarning):
    """A model has other linear layers than the one that an adapter was trained on."""


class NonFiniteWarning(UserWarning):
    """A gate's gradient was NaN or infinite, and skipped; or its tau is."""


class UnreachedSparsityWarning(UserWarning):
    """No tau closes the share of positions that `calibrate` was asked for."""
