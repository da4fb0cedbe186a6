"""The one error this library raises for what a user asked of it, its warnings, and their words."""

from collections.abc import Iterable
from typing import Any

_LENGTH = 80


class _OneLine:
    """What is said on one line that a terminal only shows, whatever names and values are in it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class TokenGateError(_OneLine, ValueError):
    """What was asked cannot be done.

    The message is one sentence: what was asked, what was found, what to do. Whatever
    was to be changed is as it was.
    """


def printable(text: str) -> str:
    """`text` with all that is not seen but obeyed escaped, as Python writes it: `\\x1b`, `\\n`.

    Names come out of files: colours, titles and line ends in them are not for a terminal, nor
    what turns the direction of a line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(shown: Iterable[str], most: int = 5) -> str:
    """The first of what is shown, and how many more there are."""
    each = list(shown)
    more = f" and {len(each) - most} more" if len(each) > most else ""
    return ", ".join(each[:most]) + more


def brief(value: Any) -> str:
    """`value` as it fits a sentence: on one line, and cut where it is long."""
    text = " ".join(repr(_beginning(value, [_LENGTH])).split())
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."


def _beginning(value: Any, left: list[int]) -> Any:
    """As much of what was read as `brief` could show, since it may be of any size."""
    left[0] -= 1  # every value takes a character
    if isinstance(value, (str, bytes)):
        return value[: _LENGTH + 1]
    if type(value) in (list, tuple):
        found = []
        for each in value:
            if left[0] < 0:
                break
            found.append(_beginning(each, left))
        return type(value)(found)
    if type(value) is dict:
        pairs = {}
        for key, each in value.items():
            if left[0] < 0:
                break
            pairs[_beginning(key, left)] = _beginning(each, left)
        return pairs
    return value


class UnreachedLayerWarning(_OneLine, UserWarning):
    """A patched layer was not called in the first forward of its model."""


class MixedPositionsWarning(_OneLine, UserWarning):
    """A layer was patched that mixes tokens or heads, so that its positions are no tokens."""


class SkippedModuleWarning(_OneLine, UserWarning):
    """Targets matched other modules than layers: those that stand for one, and those that stay."""


class DifferentBaseWarning(_OneLine, UserWarning):
    """A model has other layers, another head or running means than an adapter was trained on."""


class FrozenAdapterWarning(_OneLine, UserWarning):
    """Another library's adapter, which was in training, stays frozen beside a patch."""


class FrozenHeadWarning(_OneLine, UserWarning):
    """What a model's checkpoint had no values for, as a new head, stays frozen beside a patch."""


class SavedWithBaseWarning(_OneLine, UserWarning):
    """A patched model was saved whole, in a form that gives the base, or less, when it is read."""


class NonFiniteWarning(_OneLine, UserWarning):
    """A gate's gradient was NaN or infinite, and skipped; or its tau is."""


class OtherRuleWarning(_OneLine, UserWarning):
    """An optimiser moves a tau by another rule than its own."""


class StillGatedWarning(_OneLine, UserWarning):
    """Layers that `merge_and_unload` could not fold, and how often they are open."""


class UnenteredContextWarning(_OneLine, UserWarning):
    """`record(model)` or its like was never entered by `with`, or does not hold of what runs."""


class KernelsWarning(_OneLine, UserWarning):
    """Triton's kernels cannot be started on a GPU, and PyTorch's operations take their place."""


class LeftOutWarning(_OneLine, UserWarning):
    """An optimiser leaves out what was patched in or leads that, moves the base, or holds what is
    taken out.
    """


class RankWarning(_OneLine, UserWarning):
    """A rank is above both features of a layer."""


class UnreachedSparsityWarning(_OneLine, UserWarning):
    """No tau closes the share of positions that was asked for, or training ended before it did."""


class UselessGateWarning(_OneLine, UserWarning):
    """A gate in training closes every position, or none."""
