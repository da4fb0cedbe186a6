"""What is known of one module: counts, which of several recordings add up exactly."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

import torch

from tokengate.gates.tally import whole_grains
from tokengate.reports.histogram import RATIO_EDGES
from tokengate.reports.tables.sparsity_table import value

#: Taus are numbers of float32, of which no sum is infinite.
LARGEST_TAU = torch.finfo(torch.float32).max
_DETAILS = ("ratios", "by_sample", "by_position")
# What a file has where it is known.
_OPTIONAL = {*_DETAILS, "broken_tau"}
_BROKEN = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class ModuleSparsity:
    """One module's part of a `SparsityReport`."""

    sparsity: float
    """Eq. 23 averaged over samples, in [0, 1]; NaN if the module was never called. The share of
    each sample was rounded to 2^-30, so that sums of them are exact."""
    samples: int
    """Sequences (or images) that were averaged over."""
    positions: int
    """Positions of all samples together."""
    modified: int
    """Those of them that the modification was added to."""
    tau: float | None
    """The threshold at the time of the report; None without a gate, and where FSDP2 keeps it on
    another rank than the one that reports alone. One that is not finite is None in a file, beside
    its `broken_tau`."""
    ratios: tuple[int, ...] | None = None
    """With `record(ratios=True)`: how many positions have r where in `histogram.RATIO_EDGES`."""
    by_sample: tuple[float | None, ...] | None = None
    """With `record(positions=True)`: eq. 23 of each sample, as `Recorder.sample` counts them; None
    of one that is padding alone."""
    by_position: tuple[tuple[int, int], ...] | None = None
    """With `record(positions=True)`: for each place in the sequence, padding not counted, the
    positions that were there, and those of them that were modified."""

    @property
    def broken_tau(self) -> str | None:
        """A tau that is not finite, as "nan", "inf" or "-inf"."""
        return None if self.tau is None or math.isfinite(self.tau) else str(float(self.tau))

    def merged(self, later: ModuleSparsity) -> ModuleSparsity:
        """What one recording of both would have given. A detail that one alone has is left out."""
        called = [module for module in (self, later) if module.samples]
        samples = self.samples + later.samples
        summed = sum(whole_grains(module.sparsity * module.samples) for module in called)
        return ModuleSparsity(
            sparsity=summed / samples if samples else math.nan,
            samples=samples,
            positions=self.positions + later.positions,
            modified=self.modified + later.modified,
            tau=self.tau if later.tau is None else later.tau,
            ratios=self._joined(later, "ratios", _added),
            by_sample=self._joined(later, "by_sample", operator.add),
            by_position=self._joined(later, "by_position", _added_by_position),
        )

    def _joined(self, later: ModuleSparsity, detail: str, join: Callable[[Any, Any], Any]) -> Any:
        one, other = getattr(self, detail), getattr(later, detail)
        if one is None and not self.samples:
            return other
        if other is None and not later.samples:
            return one
        return None if one is None or other is None else join(one, other)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; without the details that were not recorded."""
        found = {**vars(self), "sparsity": value(self.sparsity), "tau": value(self.tau)}
        found["broken_tau"] = self.broken_tau
        return {k: v for k, v in found.items() if k not in _OPTIONAL or v is not None}


def module_from_dict(found: Any) -> ModuleSparsity:
    """What `to_dict` gave, from JSON.

    Raises:
        ValueError: it is something else; the text says what.
    """
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    names = {field.name for field in fields(ModuleSparsity)}
    if missing := names - found.keys() - _OPTIONAL:
        raise ValueError(f"it has no {min(missing)!r}")
    if unknown := found.keys() - names - _OPTIONAL:
        raise ValueError(f"it has an unknown {min(unknown)!r}")
    for name, (fits, what) in _CHECKS.items():
        if name in found and not fits(found[name]):
            raise ValueError(f"its {name!r} is not {what}")
    if "broken_tau" in found and found["tau"] is not None:
        raise ValueError("it has a tau that is finite, and one that is not")
    if found["modified"] > found["positions"]:
        raise ValueError("it has more modified positions than positions")
    if (found["sparsity"] is None) != (found["samples"] == 0):
        raise ValueError("it has a sparsity without samples, or samples without a sparsity")
    details = {name: _tuple(found.get(name)) for name in _DETAILS}
    broken = found.get("broken_tau")
    numbers = {
        "sparsity": math.nan if found["sparsity"] is None else float(found["sparsity"]),
        "tau": found["tau"] if broken is None else float(broken),
    }
    return ModuleSparsity(**{n: found[n] for n in names & found.keys()} | details | numbers)


def _is_count(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _is_number(found: Any) -> bool:
    number = isinstance(found, (int, float)) and not isinstance(found, bool)
    return number and abs(found) <= LARGEST_TAU


def _is_share(found: Any) -> bool:
    return found is None or (_is_number(found) and 0 <= found <= 1)


def _all(found: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(found, list) and all(map(fits, found))


def _are_pairs(found: Any) -> bool:
    return _all(found, lambda p: _all(p, _is_count) and len(p) == 2 and p[1] <= p[0])


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sparsity": (_is_share, "null or a number from 0 to 1"),
    "samples": (_is_count, "a whole number >= 0"),
    "positions": (_is_count, "a whole number >= 0"),
    "modified": (_is_count, "a whole number >= 0"),
    "tau": (lambda tau: tau is None or _is_number(tau), "null or a finite number"),
    "ratios": (
        lambda r: _all(r, _is_count) and len(r) == len(RATIO_EDGES) + 1,
        f"a list of {len(RATIO_EDGES) + 1} counts",
    ),
    "by_sample": (lambda shares: _all(shares, _is_share), "a list of shares"),
    "by_position": (_are_pairs, "a list of pairs of counts"),
    "broken_tau": (lambda tau: tau in _BROKEN, f"one of {', '.join(_BROKEN)}"),
}


def _tuple(found: Any) -> Any:
    """Lists of JSON as the tuples they were."""
    return tuple(map(_tuple, found)) if isinstance(found, list) else found


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _added_by_position(
    a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    return tuple(
        (n + n_more, modified + modified_more)
        for (n, modified), (n_more, modified_more) in zip_longest(a, b, fillvalue=(0, 0))
    )
