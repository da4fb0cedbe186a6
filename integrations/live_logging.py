"""Sparsity, tau and lambda as they are shown live: names and numbers, and TensorBoard.

    from torch.utils.tensorboard import SummaryWriter
    from tokengate.integrations.live_logging import log_to_tensorboard

    writer = SummaryWriter()
    log_to_tensorboard(writer, model, rec.report(), step, heatmap=True)

In the Trainer `TokenGateCallback` does it by itself; Weights & Biases takes `scalars` as they are.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from torch import Tensor, nn

from tokengate.gates.base import PenalisedGate
from tokengate.layers.patched import require_layers
from tokengate.reports.picture import load_plots
from tokengate.reports.report import SparsityReport
from tokengate.sharding import numbers_here

HEATMAP = "sparsity_heatmap"


def sparsities(report: SparsityReport) -> dict[str, float]:
    """Eq. 23 overall, `"sparsity"`, and of every projection, e.g. `"sparsity_q_proj"`.

    A projection is a column of the report's table; what was never called is left out.
    """
    table = report.table
    found = {"sparsity": report.sparsity}
    for column, average in zip(table.columns, table.column_averages, strict=True):
        found[f"sparsity_{column}"] = average
    return {name: value for name, value in found.items() if not math.isnan(value)}


def scalars(model: nn.Module, report: SparsityReport) -> dict[str, float]:
    """What is worth a curve each: `sparsities`, and of all gates together

    - `"tau_mean"`, `"tau_min"`, `"tau_max"`: the taus at the time of the report;
    - `"penalty"`: the average lambda, where there is a `SparsityController` the one it sets.

    Args:
        model: the patched model.
        report: of what it just ran.

    Raises:
        TokenGateError: no layer of the model is patched.
    """
    found = sparsities(report)
    taus = [m.tau for m in report.modules.values() if m.tau is not None]
    if taus:
        found |= {"tau_mean": statistics.fmean(taus), "tau_min": min(taus), "tau_max": max(taus)}
    penalties = _penalties(model)
    if penalties:
        found["penalty"] = statistics.fmean(penalties)
    return found


def log_to_tensorboard(
    writer: Any,
    model: nn.Module,
    report: SparsityReport,
    step: int,
    *,
    prefix: str = "train",
    heatmap: bool = False,
) -> None:
    """`scalars` as curves with names like `train/sparsity`, and a heatmap if it is wanted.

    Args:
        writer: a `SummaryWriter`, or what has its `add_scalar` and `add_image`.
        model: the patched model.
        report: of what it just ran.
        step: where on the curves.
        prefix: what stands before every name, as in the Trainer's own logs.
        heatmap: also add `report.plot()` as an image; the drawing takes a fraction of a second.

    Raises:
        TokenGateError: no layer of the model is patched; a heatmap without matplotlib.
    """
    found = scalars(model, report)
    image = pixels(report) if heatmap else None
    for name, value in found.items():
        writer.add_scalar(f"{prefix}/{name}", value, step)
    if image is not None:
        writer.add_image(f"{prefix}/{HEATMAP}", image, step, dataformats="HWC")


def pixels(report: SparsityReport) -> Any:
    """The report's heatmap as a numpy array `(height, width, 3)` of 8-bit red, green and blue."""
    return load_plots().pixels(report.plot())


def _penalties(model: nn.Module) -> list[float]:
    gates = [layer.gate for layer in require_layers(model, "scalars").values()]
    penalised = [gate for gate in gates if isinstance(gate, PenalisedGate)]
    found = [g.penalty if g._controlled is None else g._controlled for g in penalised]
    controlled = iter(numbers_here(p for p in found if isinstance(p, Tensor)))
    here = [next(controlled) if isinstance(p, Tensor) else p for p in found]
    return [penalty for penalty in here if penalty is not None]
