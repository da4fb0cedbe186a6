"""Sparsity by module, by layer and projection, and overall (eq. 23, Table 5)."""

from __future__ import annotations

import csv
import importlib
import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokengate.atomic_write import write_atomically
from tokengate.errors import TokenGateError
from tokengate.text_table import text_table


@dataclass(frozen=True)
class ModuleSparsity:
    """One module's part of a `SparsityReport`."""

    sparsity: float
    """Eq. 23 averaged over samples, in [0, 1]; NaN if the module was never called."""
    samples: int
    """Sequences (or images) that were averaged over."""
    positions: int
    """Positions of all samples together."""
    modified: int
    """Those of them that the modification was added to."""
    tau: float | None
    """The threshold at the time of the report; None without a gate, and where FSDP2 keeps it on
    another rank than the one that reports alone."""


@dataclass(frozen=True)
class SparsityTable:
    """Sparsity by layer (rows) and projection (columns), in [0, 1]; None where there is none."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]

    @property
    def row_averages(self) -> list[float]:
        """Average of each layer over its projections."""
        return [_mean(row) for row in self.values]

    @property
    def column_averages(self) -> list[float]:
        """Average of each projection over the layers that have it."""
        return [_mean(column) for column in zip(*self.values, strict=True)]


class SparsityReport:
    """Sparsity: the share of positions that the modifications left alone (eq. 23).

    Attributes:
        modules: everything known of each module, by name.
    """

    def __init__(self, modules: dict[str, ModuleSparsity]) -> None:
        self.modules = modules

    @property
    def by_module(self) -> dict[str, float]:
        """Sparsity of each module, in [0, 1]; NaN where it was never called."""
        return {name: module.sparsity for name, module in self.modules.items()}

    @property
    def sparsity(self) -> float:
        """Sparsity averaged over samples, then over the modules that were called (eq. 23)."""
        return _mean(self.by_module.values())

    @property
    def std(self) -> float:
        """Standard deviation (population) of sparsity over the modules that were called."""
        called = _present(self.by_module.values())
        return statistics.pstdev(called) if called else math.nan

    @property
    def token_sparsity(self) -> float:
        """Share of unmodified positions over all positions of all modules together."""
        positions = sum(module.positions for module in self.modules.values())
        modified = sum(module.modified for module in self.modules.values())
        return 1 - modified / positions if positions else math.nan

    @property
    def table(self) -> SparsityTable:
        """Layer x projection, the shape of the paper's Table 5.

        A name is split at its first whole number: `model.layers.3.self_attn.q_proj` is row 3,
        column `q_proj` (as much of the end as tells the columns apart).
        """
        rows, columns, names = name_grid(self.modules)
        by_module = self.by_module
        values = [[_value(by_module.get(name or "")) for name in row] for row in names]
        return SparsityTable(rows, columns, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; a module that was never called has sparsity None."""
        return {
            "sparsity": _value(self.sparsity),
            "std": _value(self.std),
            "token_sparsity": _value(self.token_sparsity),
            "modules": {
                name: {**asdict(module), "sparsity": _value(module.sparsity)}
                for name, module in self.modules.items()
            },
        }

    def to_csv(self) -> str:
        """One line for each module; an empty field where there is no value."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["module", "sparsity", "samples", "positions", "modified", "tau"])
        for name, m in self.modules.items():
            writer.writerow([name, _value(m.sparsity), m.samples, m.positions, m.modified, m.tau])
        return text.getvalue()

    def to_markdown(self) -> str:
        """The layer x projection table in percent, with averages, as Markdown."""
        head, *body = self._grid()
        lines = [head, [":--", *["--:"] * (len(head) - 1)], *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """The layer x projection table as a picture, a `matplotlib.figure.Figure`.

        Args:
            path: a file to write it to as well, in the format of its ending (.png, .pdf, .svg).

        Raises:
            TokenGateError: matplotlib is not installed.
        """
        figure = load_plots().heatmap(self)
        if path is not None:
            write_atomically(Path(path), figure.savefig)
        return figure

    def __str__(self) -> str:
        head, *body = self._grid()
        called = len(_present(self.by_module.values()))
        summary = (
            f"sparsity {100 * self.sparsity:.1f} % (std {100 * self.std:.1f}) over {called} modules"
            f"; {100 * self.token_sparsity:.1f} % of all positions left unmodified"
        )
        uncalled = len(self.modules) - called
        if uncalled:
            summary += f"; {uncalled} modules were never called"
        return "\n".join(["sparsity (%)", text_table(head, body), summary])

    def _grid(self) -> list[list[str]]:
        table = self.table
        rows = zip(table.rows, table.values, table.row_averages, strict=True)
        return [
            ["layer", *table.columns, "avg"],
            *[[name, *map(_percent, values), _percent(average)] for name, values, average in rows],
            ["avg", *map(_percent, table.column_averages), _percent(self.sparsity)],
        ]


def load_plots() -> Any:
    """The module that draws, `tokengate.integrations.plots`; an error without matplotlib."""
    try:
        # By its name, because integrations import tokengate and never the reverse.
        return importlib.import_module("tokengate.integrations.plots")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise TokenGateError(
            "a picture was asked for without matplotlib: install it, pip install 'tokengate[viz]'."
        ) from None


def name_grid(names: Iterable[str]) -> tuple[list[str], list[str], list[list[str | None]]]:
    """Modules by layer and projection: the rows' labels, the columns', and who is where."""
    split = {name: _split(name) for name in names}
    columns = _short({column for _, _, column in split.values()})
    several = len({stem for stem, number, _ in split.values() if number}) > 1
    cells: dict[str, dict[str, str]] = {}
    for name, (stem, number, column) in split.items():
        row = number if number and not several else ".".join(filter(None, (stem, number)))
        cells.setdefault(row, {})[columns[column]] = name
    heads = list(dict.fromkeys(columns[column] for _, _, column in split.values()))
    return list(cells), heads, [[row.get(head) for head in heads] for row in cells.values()]


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


def _value(number: float | None) -> float | None:
    return None if number is None or math.isnan(number) else number


def _present(numbers: Iterable[float | None]) -> list[float]:
    return [number for number in map(_value, numbers) if number is not None]


def _mean(numbers: Iterable[float | None]) -> float:
    present = _present(numbers)
    return statistics.fmean(present) if present else math.nan


def _percent(number: float | None) -> str:
    return "-" if _value(number) is None else f"{100 * number:.1f}"  # type: ignore[operator]
