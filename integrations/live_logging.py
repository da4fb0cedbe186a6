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
from collections.abc import Iterable
from typing import Any

from torch import nn

from tokengate import TokenGateError
from tokengate.gates.base import Gate, PenalisedGate
from tokengate.layers.patched import require_layers
from tokengate.reports.picture import load_plots
from tokengate.reports.recording import Recorder
from tokengate.reports.report import SparsityReport

HEATMAP = "sparsity_heatmap"


def report_of(recorder: Recorder | None) -> SparsityReport | None:
    """What was counted on all processes; None where none of them had anything to run."""
    if recorder is None:
        return None
    try:
        report = recorder.report(reduce=True)
    except TokenGateError:
        return None
    return None if math.isnan(report.sparsity) else report


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

    - `"tau_mean"`, `"tau_min"`, `"tau_max"`: the taus at the time of the report that are finite,
      and `"tau_broken"`, how many are not, where there are any;
    - `"tau_skipped"`, where there were any: gradients that were not finite and that optimisers have
      skipped so far;
    - `"penalty"`: the average lambda.

    Args:
        model: the patched model.
        report: of what it just ran.

    Raises:
        TokenGateError: no layer of the model is patched.
    """
    found = sparsities(report)
    patched = require_layers(model, "scalars").values()
    gates = [layer.gate for layer in patched if layer.gate is not None]
    found |= tau_scalars([m.tau for m in report.modules.values()], gates)
    penalties = [gate.penalty for gate in gates if isinstance(gate, PenalisedGate)]
    if penalties:
        found["penalty"] = statistics.fmean(penalties)
    return found


def tau_scalars(taus: Iterable[float | None], gates: Iterable[Gate]) -> dict[str, float]:
    """What `scalars` has of the taus, of which None is on another rank, and of their gates."""
    here = [tau for tau in taus if tau is not None]
    finite = [tau for tau in here if math.isfinite(tau)]
    found: dict[str, float] = {}
    if finite:
        mean = statistics.fmean(finite)
        found = {"tau_mean": mean, "tau_min": min(finite), "tau_max": max(finite)}
    wrong = {"broken": len(here) - len(finite), "skipped": sum(gate.skipped for gate in gates)}
    return found | {f"tau_{what}": number for what, number in wrong.items() if number}


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
