"""What the page's script is told of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokengate.reports.histogram import RATIO_EDGES
from tokengate.reports.module_sparsity import ModuleSparsity
from tokengate.reports.tables.sparsity_table import mean, value

# Places in the sequence that a curve is told apart in; more of them share one.
_PLACES = 96


@dataclass(frozen=True)
class Shown:
    """One report, as the page has it."""

    name: str
    """What it is called beside another one."""
    modules: Mapping[str, ModuleSparsity]
    averages: Mapping[str, float | None]
    """Its "sparsity", "std" and "token_sparsity"."""
    about: Mapping[str, str]


def report_data(report: Shown, places: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """For the page's JSON: a list has an entry for each of `places`, None of what it has not.

    Args:
        report: the one.
        places: row and column of each module of all reports of the page.
    """
    modules = [report.modules.get(name) for name in places]
    rows, columns = zip(*places.values(), strict=True) if places else ((), ())
    longest = max((len(m.by_position or ()) for m in modules if m), default=0)
    width = max(1, -(-longest // _PLACES))
    seen: list[list[int]] = []  # the positions at each place, which many modules have alike
    return {
        "name": report.name,
        "about": dict(report.about),
        "sparsity": report.averages["sparsity"],
        "row_averages": _averages(modules, rows),
        "column_averages": _averages(modules, columns),
        # The first of the edges of r, and how many there are to the octave.
        "edges": {"first": RATIO_EDGES[0], "octave": 4},
        "places": {"width": width, "positions": seen},
        "modules": [None if m is None else _module(m, width, seen) for m in modules],
    }


def _averages(modules: Sequence[ModuleSparsity | None], groups: Sequence[str]) -> list[Any]:
    """Sparsity averaged within each group, in the order of their first members."""
    found: dict[str, list[float]] = {group: [] for group in groups}
    for module, group in zip(modules, groups, strict=True):
        if module is not None:
            found[group].append(module.sparsity)
    return [value(mean(shares)) for shares in found.values()]


def _module(module: ModuleSparsity, width: int, seen: list[list[int]]) -> dict[str, Any]:
    # Not what is known of every sample, which may be much.
    found: dict[str, Any] = {
        "sparsity": value(module.sparsity),
        "samples": module.samples,
        "positions": module.positions,
        "modified": module.modified,
        # As it is to be read: a broken one may be NaN, which JSON has not.
        "tau": module.broken_tau or (None if module.tau is None else f"{module.tau:.4g}"),
    }
    if module.ratios is not None:
        filled = [i for i, count in enumerate(module.ratios) if count]
        if filled:
            first, last = filled[0], filled[-1] + 1
            found["ratios"] = [first, *module.ratios[first:last]]
    if module.by_position is not None:
        counts = [
            module.by_position[i : i + width] for i in range(0, len(module.by_position), width)
        ]
        positions, modified = (
            [sum(pair[which] for pair in place) for place in counts] for which in (0, 1)
        )
        if positions not in seen:
            seen.append(positions)
        found["places"] = [seen.index(positions), *modified]
    return found
