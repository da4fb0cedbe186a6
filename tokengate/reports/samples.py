"""One sample of a recording: its S, its r and its padding, in every module."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor

from tokengate.errors import TokenGateError, brief
from tokengate.reports.call_store import CallStore


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample, of T positions in each of its modules."""

    is_open: dict[str, Tensor]
    """S by module, in the model's order: boolean, `(T,)`."""
    ratios: dict[str, Tensor] | None
    """r by module, where it has a gate: float16, `(T,)`. None without `record(ratios=True)`."""
    real: Tensor
    """Which positions are no padding: boolean, `(T,)`."""


class Samples(Sequence[Sample]):
    """The samples of a recording, in the order of calls and, within a call, of its rows.

    Attributes:
        modules: the names of those that they are seen in, all of which were called alike: as
            often, and with as many samples, as long and as padded.
    """

    def __init__(self, store: CallStore, modules: list[str], ratios: bool) -> None:
        self.modules = modules
        self._store, self._ratios = store, ratios
        first = modules[0]
        calls = [store.by_sample(first, call) for call in range(store.count(first))]
        # The number of samples up to the end of each call.
        self._ends = list(itertools.accumulate(rows for rows, _ in calls))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        at = range(len(self))[index]
        if isinstance(at, range):
            return [self[each] for each in at]
        call = bisect.bisect_right(self._ends, at)
        store, first = self._store, self.modules[0]
        rows, length = store.by_sample(first, call)
        row = at - (self._ends[call] - rows)
        return Sample(
            {n: store.is_open(n, call).reshape(rows, length)[row] for n in self.modules},
            {
                n: store.ratios(n, call).reshape(rows, length)[row]
                for n in self.modules
                if store.has_ratios(n)
            }
            if self._ratios
            else None,
            store.real(first, call)[row],
        )


def alike(store: CallStore, modules: Sequence[str], ratios: bool) -> list[Samples]:
    """The samples in each set of modules that were called alike, the largest set first."""
    sets: dict[tuple[bytes, bytes], list[str]] = {}
    for name in modules:
        sets.setdefault(store.likeness(name), []).append(name)
    return [Samples(store, names, ratios) for names in sorted(sets.values(), key=len, reverse=True)]


def within(sets: list[Samples], modules: Collection[str]) -> list[Samples]:
    """The samples in `modules` alone, or an error where one of them was not called."""
    called = {name for samples in sets for name in samples.modules}
    unknown = [name for name in modules if name not in called]
    if unknown or not modules:
        what = f"{brief(unknown[0])}, which was not called" if unknown else "no module"
        raise TokenGateError(
            f"a sample was asked of {what}: pass names that are in rec.positions, or None."
        )
    chosen = [(each, [n for n in each.modules if n in modules]) for each in sets]
    return [Samples(each._store, names, each._ratios) for each, names in chosen if names]


def only(sets: list[Samples]) -> Samples:
    """The samples in modules that were all called alike, or an error."""
    first, *others = sets
    if others:
        one, other = first.modules[0], others[0].modules[0]
        raise TokenGateError(
            f"samples were asked in {brief(one)} and {brief(other)}, which were not called alike, "
            "so that one's samples are not known to be the other's: pass modules=, e.g. those of "
            "one of rec.alike."
        )
    return first
