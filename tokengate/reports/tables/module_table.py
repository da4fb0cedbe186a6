"""The modules of a report to be read elsewhere: a line for each, or a sentence of all."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from tokengate.errors import TokenGateError, listed
from tokengate.files.text_table import csv_table
from tokengate.reports.module_sparsity import ModuleSparsity
from tokengate.reports.tables.sparsity_table import value

_COLUMNS = ("module", "sparsity", "samples", "positions", "modified", "tau")


def csv_of(modules: Mapping[str, ModuleSparsity]) -> str:
    """Comma-separated; an empty field where there is no value."""
    return csv_table(_COLUMNS, _lines(modules))


def frame_of(modules: Mapping[str, ModuleSparsity]) -> Any:
    """A `pandas.DataFrame`; NaN where there is no value.

    Raises:
        TokenGateError: pandas is not installed.
    """
    try:
        pandas: Any = importlib.import_module("pandas")
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise TokenGateError(
            "to_frame was asked for without pandas: install it, pip install pandas, or take "
            "to_dict() or to_csv()."
        ) from None
    frame = pandas.DataFrame(_lines(modules), columns=list(_COLUMNS))
    return frame.astype({"sparsity": float, "tau": float})


def _lines(modules: Mapping[str, ModuleSparsity]) -> list[list[Any]]:
    return [
        [name, value(m.sparsity), m.samples, m.positions, m.modified, m.tau]
        for name, m in modules.items()
    ]


def summary(
    modules: Mapping[str, ModuleSparsity], sparsity: float, std: float, token_sparsity: float
) -> str:
    """What the averages of a report are, and which of its modules are in none, or broken."""
    called = sum(not math.isnan(module.sparsity) for module in modules.values())
    parts = [
        f"sparsity {100 * sparsity:.1f} % (std {100 * std:.1f}) over {called} modules",
        f"{100 * token_sparsity:.1f} % of all positions left unmodified",
    ]
    if called < len(modules):
        parts.append(f"{len(modules) - called} modules were never called")
    broken = [f"{name} ({m.broken_tau})" for name, m in modules.items() if m.broken_tau]
    if broken:
        parts.append(f"tau is not finite in {listed(broken)}")
    return "; ".join(parts)
