"""Regular expressions of strangers, matched in time that grows with the text and no faster.

`re` tries one way after the other, of which `(a+)+$` has a million for twenty characters. Here all
ways are followed at once: what could come next is a set of places in the pattern, and each set that
was met is remembered with what the next character makes of it. Whether one character, or one `^` or
`\\b`, fits is still asked of `re` itself, so that it means what it means there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from tokengate import TokenGateError
from tokengate.errors import brief

try:  # its name since Python 3.11
    from re import _compiler as compiler  # type: ignore[attr-defined]
    from re import _constants as c
    from re import _parser as parser
except ImportError:
    import sre_compile as compiler  # type: ignore[no-redef]
    import sre_constants as c  # type: ignore[no-redef]
    import sre_parse as parser  # type: ignore[no-redef]

# In characters and in places: enough for an alternative for each of 4,000 layers.
_LONGEST = 1 << 18
_OF_ONE = (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN)
# Steps of the matching; a second or two. The layers of any model need far less.
_WORK = 8_000_000
# What else takes as long as so many of them: a pattern, a character of it, a place.
_PATTERN, _CHARACTER, _PLACE = 1000, 4, 12


class Work:
    """How much may still be done for the patterns of one adapter, in steps."""

    def __init__(self, left: int = _WORK) -> None:
        self._left = left

    def do(self, steps: int, source: str) -> None:
        """Count them.

        Raises:
            TokenGateError: there were too many.
        """
        self._left -= steps
        if self._left < 0:
            raise TokenGateError(
                f"the pattern {brief(source)} takes longer to match than patterns of any adapter "
                "should: write the names out instead."
            )


class LinearPattern:
    """A regular expression, which says of a text whether `re` would find a match.

    It has everything of `re` but references to groups, atomic groups and possessive repeats.

    Args:
        source: the expression.
        work: what it may cost, with others.

    Raises:
        re.error: it is none.
        TokenGateError: it has what is not known here, or is too large.
    """

    def __init__(self, source: str, work: Work) -> None:
        self.source, self._work = source, work
        if len(source) > _LONGEST:
            raise TokenGateError(f"the pattern {brief(source)} is too long: write names instead.")
        work.do(_PATTERN + _CHARACTER * len(source), source)
        try:
            parsed = parser.parse(source)
            self._machine = _Builder(source, parsed, work).machine(list(parsed))
        except (RecursionError, OverflowError, MemoryError):
            raise TokenGateError(
                f"the pattern {brief(source)} is nested too deeply, or repeats too often: write "
                "the names out instead."
            ) from None

    def fullmatch(self, text: str, start: int = 0, end: int | None = None) -> bool:
        """Whether it matches all of `text[start:end]`; what is around it, `\\b` and `^` see."""
        return self._machine.matches(text, start, len(text) if end is None else end)

    def match(self, text: str) -> bool:
        """Whether it matches a beginning of the text."""
        return self._machine.matches(text, 0, None)

    def stands_alone(self) -> bool:
        """Whether what is written behind it would follow it, and not its last alternative."""
        mark = 0xE000  # in no name
        parsed = list(parser.parse(self.source + chr(mark)))
        return bool(parsed) and parsed[-1] == (c.LITERAL, mark)


class _Machine:
    """All ways through a pattern, from place 0 on, or wherever it is begun."""

    def __init__(self, source: str, work: Work) -> None:
        self._source, self._work = source, work
        self.first = self.last = 0
        # From a place: with one character to another; without any; without any if a test holds.
        self.steps: dict[int, tuple[Callable[[str], bool], int]] = {}
        self.free: dict[int, list[int]] = {}
        self.tests: dict[int, tuple[Callable[[str, int], bool], int]] = {}
        # What was met: sets by number, and what follows from them.
        self._sets: dict[frozenset[int], int] = {}
        self._members: list[frozenset[int]] = []
        self._asked: dict[int, list[int]] = {}
        self._open: dict[tuple[int, tuple[bool, ...]], int] = {}
        self._next: dict[tuple[int, str], int] = {}

    def matches(self, text: str, start: int, end: int | None) -> bool:
        """Whether a way ends at `end`; None: anywhere."""
        now = self._number({self.first})
        stop = len(text) if end is None else end
        self._work.do(max(1, stop - start), self._source)
        for at in range(start, stop + 1):
            now = self._opened(now, text, at)
            if (end is None or at == end) and self.last in self._members[now]:
                return True
            if at == stop or not self._members[now]:
                return False
            key = (now, text[at])
            found = self._next.get(key)
            now = self._step(key) if found is None else found
        return False

    def _step(self, key: tuple[int, str]) -> int:
        places, character = self._members[key[0]], key[1]
        self._work.do(len(places), self._source)
        steps = (self.steps[place] for place in places if place in self.steps)
        found = self._number({after for fits, after in steps if fits(character)})
        self._next[key] = found
        return found

    def _opened(self, now: int, text: str, at: int) -> int:
        """With all that is reached from there without a character."""
        asked = self._asked.get(now)
        if asked is None:
            reached = self._reached(self._members[now], lambda place: True)
            asked = self._asked[now] = sorted(reached & self.tests.keys())
        holds = tuple([self.tests[place][0](text, at) for place in asked])
        found = self._open.get((now, holds))
        if found is None:
            true = {place for place, each in zip(asked, holds, strict=True) if each}
            found = self._number(self._reached(self._members[now], true.__contains__))
            self._open[now, holds] = found
        return found

    def _reached(self, places: frozenset[int], holds: Callable[[int], bool]) -> set[int]:
        found, new = set(places), list(places)
        while new:
            place = new.pop()
            after = self.free.get(place, [])
            if place in self.tests and holds(place):
                after = [self.tests[place][1]]
            for each in after:
                if each not in found:
                    found.add(each)
                    new.append(each)
        self._work.do(len(found), self._source)
        return found

    def _number(self, places: set[int]) -> int:
        known = frozenset(places)
        number = self._sets.setdefault(known, len(self._members))
        if number == len(self._members):
            self._members.append(known)
        return number


class _Builder:
    """Makes the machine of a parsed pattern, from its end to its beginning."""

    def __init__(self, source: str, parsed: Any, work: Work) -> None:
        self._source, self._work = source, work
        self._flags = parsed.state.flags
        self._places = 0
        self._m = _Machine(source, work)

    def machine(self, items: list[Any]) -> _Machine:
        """All of them, one after the other."""
        before, self._m = self._m, _Machine(self._source, self._work)
        self._m.last = self._place()
        self._m.first = self._sequence(items, self._m.last)
        made, self._m = self._m, before
        return made

    def _place(self) -> int:
        self._places += 1
        self._work.do(_PLACE, self._source)
        if self._places > _LONGEST:
            raise OverflowError
        return self._places

    def _sequence(self, items: Any, after: int) -> int:
        for op, value in reversed(list(items)):
            after = self._item(op, value, after)
        return after

    def _item(self, op: Any, value: Any, after: int) -> int:
        """The place from which this item leads to `after`."""
        m = self._m
        if op is c.MAX_REPEAT or op is c.MIN_REPEAT:
            return self._repeat(*value, after)
        if op is c.SUBPATTERN:
            _, more, fewer, inner = value
            flags = self._flags
            kept = flags & ~parser.TYPE_FLAGS if more & parser.TYPE_FLAGS else flags
            self._flags = (kept | more) & ~fewer
            place = self._sequence(inner, after)
            self._flags = flags
            return place
        place = self._place()
        if op in _OF_ONE:
            m.steps[place] = (self._character(op, value), after)
        elif op is c.BRANCH:
            m.free[place] = [self._sequence(each, after) for each in value[1]]
        elif op is c.AT:
            m.tests[place] = (self._position(op, value), after)
        elif op is c.ASSERT or op is c.ASSERT_NOT:
            m.tests[place] = (self._look(op is c.ASSERT, *value), after)
        elif str(op) == "FAILURE":  # (?!)
            pass
        else:
            raise TokenGateError(
                f"the pattern {brief(self._source)} has a {op}, which is not known here: write "
                "it without, or the names out instead."
            )
        return place

    def _repeat(self, least: int, most: Any, inner: Any, after: int) -> int:
        place = after
        if most is c.MAXREPEAT:
            place = self._place()
            self._m.free[place] = [self._sequence(inner, place), after]
        else:
            for _ in range(most - least):
                again = self._place()
                self._m.free[again] = [self._sequence(inner, place), after]
                place = again
        for _ in range(least):
            self._work.do(_PLACE, self._source)  # nothing, repeated, has no place of its own
            place = self._sequence(inner, place)
        return place

    def _character(self, op: Any, value: Any) -> Callable[[str], bool]:
        if op is c.LITERAL and not self._flags & re.IGNORECASE:
            return chr(value).__eq__
        fits = _alone(op, _hashable(value), self._flags).fullmatch
        return lambda character: fits(character) is not None

    def _position(self, op: Any, value: Any) -> Callable[[str, int], bool]:
        fits = _alone(op, _hashable(value), self._flags).match
        return lambda text, at: fits(text, at) is not None

    def _look(self, wanted: bool, direction: int, inner: Any) -> Callable[[str, int], bool]:
        """Whether what follows, or what was before, is so; of the latter the width is known."""
        machine = self.machine(list(inner))
        if direction > 0:
            return lambda text, at: machine.matches(text, at, None) == wanted
        width = inner.getwidth()[0]
        return lambda text, at: (at >= width and machine.matches(text, at - width, at)) == wanted


@functools.lru_cache(maxsize=1024)
def _alone(op: Any, value: Any, flags: int) -> re.Pattern[str]:
    """One item as a pattern of `re`, under the flags that hold where it stands."""
    state = parser.State()
    state.flags, state.str = flags, ""
    item = (op, list(value) if isinstance(value, tuple) else value)
    found: re.Pattern[str] = compiler.compile(parser.SubPattern(state, [item]), flags)
    return found


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
