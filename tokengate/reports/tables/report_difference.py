"""What changed from one report to another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokengate.files.text_table import lines, markdown_table, text_table
from tokengate.reports.module_sparsity import ModuleSparsity
from tokengate.reports.tables.sparsity_table import mean, percent, value


@dataclass(frozen=True)
class ModuleChange:
    """One module in both reports."""

    sparsity: tuple[float, float]
    """Eq. 23 in a and in b; NaN where it was never called."""
    tau: tuple[float | None, float | None]
    """The thresholds in a and in b."""

    @property
    def change(self) -> float:
        """Sparsity in b less that in a; NaN if one of them does not know."""
        return self.sparsity[1] - self.sparsity[0]


@dataclass(frozen=True)
class ReportDifference:
    """From a report a to a report b."""

    modules: dict[str, ModuleChange]
    """Those in both, by name: the largest change of sparsity first, unknown changes last."""
    only_in_a: list[str]
    """Names of modules."""
    only_in_b: list[str]
    """Names of modules."""

    @property
    def change(self) -> float:
        """The average change of the modules of which it is known."""
        return mean(module.change for module in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; None where there is none."""
        return {
            "change": value(self.change),
            "modules": {
                name: {
                    "sparsity": list(map(value, module.sparsity)),
                    "change": value(module.change),
                    "tau": list(map(value, module.tau)),
                }
                for name, module in self.modules.items()
            },
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
        }

    def to_markdown(self) -> str:
        """The table of modules as Markdown, sparsities in percent."""
        return markdown_table(*self._grid())

    def __str__(self) -> str:
        left = [f"only in a: {name}" for name in self.only_in_a]
        left += [f"only in b: {name}" for name in self.only_in_b]
        parts = ["sparsity (%)", text_table(*self._grid()), lines(left)]
        return "\n".join(part for part in parts if part)

    def _grid(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [
                name,
                *map(percent, module.sparsity),
                _signed(module.change),
                *("-" if tau is None else f"{tau:.4g}" for tau in module.tau),
            ]
            for name, module in self.modules.items()
        ]
        return ["module", "a", "b", "change", "tau in a", "tau in b"], rows


def report_difference(
    a: Mapping[str, ModuleSparsity], b: Mapping[str, ModuleSparsity]
) -> ReportDifference:
    """What changed in the modules of two reports."""
    both = {
        name: ModuleChange((one.sparsity, b[name].sparsity), (one.tau, b[name].tau))
        for name, one in a.items()
        if name in b
    }

    def largest_first(item: tuple[str, ModuleChange]) -> float:
        change = item[1].change
        return math.inf if math.isnan(change) else -abs(change)

    return ReportDifference(
        dict(sorted(both.items(), key=largest_first)),
        [name for name in a if name not in b],
        [name for name in b if name not in a],
    )


def _signed(change: float) -> str:
    return "-" if math.isnan(change) else f"{100 * change:+.1f}"
