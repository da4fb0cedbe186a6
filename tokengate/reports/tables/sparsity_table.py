"""Layer x projection, the shape of the paper's Table 5."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# One of a layer's experts, in the name of a module.
EXPERT = re.compile(r"(^|\.)experts\.(\d+)\.")


@dataclass(frozen=True)
class SparsityTable:
    """Sparsity by layer (rows) and projection (columns), in [0, 1]; None where there is none."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]

    @property
    def row_averages(self) -> list[float]:
        """Average of each layer over its projections."""
        return [mean(row) for row in self.values]

    @property
    def column_averages(self) -> list[float]:
        """Average of each projection over the layers that have it."""
        return [mean(column) for column in zip(*self.values, strict=True)]

    @property
    def row_stds(self) -> list[float]:
        """Standard deviation (population) of each layer over its projections."""
        return [std(row) for row in self.values]

    @property
    def column_stds(self) -> list[float]:
        """Standard deviation (population) of each projection over the layers that have it."""
        return [std(column) for column in zip(*self.values, strict=True)]

    def percents(self, overall: float) -> tuple[list[str], list[list[str]]]:
        """Its head and lines as text, in percent, with averages, the last of which is `overall`."""
        rows = zip(self.rows, self.values, self.row_averages, strict=True)
        return ["layer", *self.columns, "avg"], [
            *[[name, *map(percent, values), percent(average)] for name, values, average in rows],
            ["avg", *map(percent, self.column_averages), percent(overall)],
        ]


def table_of(by_module: Mapping[str, float]) -> SparsityTable:
    """The table of what is known by the names of modules; experts of one layer are averaged."""
    together: dict[str, list[float]] = {}
    for name, number in by_module.items():
        together.setdefault(EXPERT.sub(r"\1experts.", name), []).append(number)
    by_module = {name: mean(numbers) for name, numbers in together.items()}
    rows, columns, names = name_grid(by_module)
    # A layer that is the whole model has the name "".
    values = [[None if n is None else value(by_module[n]) for n in row] for row in names]
    return SparsityTable(rows, columns, values)


def name_grid(names: Iterable[str]) -> tuple[list[str], list[str], list[list[str | None]]]:
    """Modules by layer and projection: the rows' labels, the columns', and who is where."""
    found = places(names)
    cells: dict[str, dict[str, str]] = {}
    for name, (row, column) in found.items():
        cells.setdefault(row, {})[column] = name
    heads = list(dict.fromkeys(column for _, column in found.values()))
    return list(cells), heads, [[row.get(head) for head in heads] for row in cells.values()]


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Row and column of each module in the table."""
    split = {name: _split(name) for name in names}
    columns = _short({column for _, _, column in split.values()})
    several = len({stem for stem, number, _ in split.values() if number}) > 1
    return {
        name: (
            number if number and not several else ".".join(filter(None, (stem, number))),
            columns[column],
        )
        for name, (stem, number, column) in split.items()
    }


def value(number: float | None) -> float | None:
    """The number; None where it is none that is finite."""
    return None if number is None or not math.isfinite(number) else number


def present(numbers: Iterable[float | None]) -> list[float]:
    """Those of them that are numbers."""
    return [number for number in map(value, numbers) if number is not None]


def mean(numbers: Iterable[float | None]) -> float:
    """Of those that are numbers; NaN where there are none."""
    found = present(numbers)
    return statistics.fmean(found) if found else math.nan


def std(numbers: Iterable[float | None]) -> float:
    """Their standard deviation (population); NaN where there are none."""
    found = present(numbers)
    return statistics.pstdev(found) if found else math.nan


def percent(number: float | None) -> str:
    """A share as it stands in a table."""
    return "-" if value(number) is None else f"{100 * number:.1f}"  # type: ignore[operator]


def _split(name: str) -> tuple[str, str, str]:
    """What stands before a name's first whole number, that number, and what stands after it."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[:i]), part, ".".join(parts[i + 1 :])
    return name, "", name


def _short(names: set[str]) -> dict[str, str]:
    """Each dotted name's shortest end that no other name shares."""
    short = {}
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        others = [f".{other}" for other in names if other != name]
        short[name] = next((e for e in ends if not any(o.endswith(f".{e}") for o in others)), name)
    return short
