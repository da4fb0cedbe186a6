"""Pictures of reports and trainings (matplotlib): which layers, modules and steps matter.

    from tokengate.integrations import plots

    plots.heatmap(report).savefig("sparsity.png")

Each function returns a figure of its own, made without pyplot: no window opens, no backend is
chosen, and nothing has to be closed. A notebook shows what its cell's last line returns.
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import tokengate
from tokengate import TokenGateError
from tokengate.reports.report import SparsityReport, check_report
from tokengate.reports.tables.sparsity_table import EXPERT, SparsityTable, name_grid

# Okabe and Ito's colours, which colour-blind people tell apart, without their yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS, DASHES = "os^Dv*X", ("-", "--", ":", "-.")
# From dark to light for all eyes; what is not there has a grey that is not among its colours.
COLOUR_MAP, NOTHING = "viridis", "0.9"


class Picture(Figure):
    """A figure that notebooks show without pyplot."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def heatmap(found: SparsityReport | SparsityTable, ax: Axes | None = None) -> Figure:
    """Sparsity in percent by layer and projection, the shape of the paper's Table 5.

    A cell without a value, which is not a sparsity of 0, is grey and has a dash.

    Args:
        found: a report, or its table.
        ax: where to draw; None for a figure of its own.

    Raises:
        TokenGateError: it is neither, or has no module.
    """
    if not isinstance(found, SparsityReport | SparsityTable):
        raise TokenGateError(
            f"heatmap was given a {type(found).__name__}: pass a SparsityReport or its table."
        )
    report = found if isinstance(found, SparsityReport) else None
    table = found.table if isinstance(found, SparsityReport) else found
    if not table.columns:
        raise TokenGateError(
            "heatmap was given a report without a module, of which there is nothing to draw: pass "
            "one of something that was run."
        )
    if ax is None:
        width, height = 2.2 + 0.75 * len(table.columns), 1.2 + 0.24 * len(table.rows)
        ax = Picture(max(width, 4.0), max(height, 2.6)).subplots()
    values = [[math.nan if v is None else 100 * v for v in row] for row in table.values]
    colours = matplotlib.colormaps[COLOUR_MAP].with_extremes(bad=NOTHING)
    image = ax.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text = "-" if math.isnan(value) else f"{value:.0f}"
            colour = "white" if value < 60 else "black"
            label = ax.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
            label.set_in_layout(False)  # within the cell; to ask all takes a fifth of the time
    ax.set_yticks(range(len(table.rows)), table.rows, fontsize=8)
    ax.set_xticks(range(len(table.columns)), table.columns, fontsize=8)
    if max(map(len, table.columns), default=0) > 9:
        ax.tick_params("x", rotation=30, rotation_mode="xtick")
    ax.set_ylabel("layer")
    overall = f", {100 * report.sparsity:.1f} % overall" if report else ""
    ax.set_title(f"positions left unmodified{overall}", fontsize=10)
    _figure(ax).colorbar(image, ax=ax, label="sparsity (%)")
    return _figure(ax)


def experts(report: SparsityReport, ax: Axes | None = None) -> Figure:
    """Of a mixture, by layer and expert: the share of its routed positions that were modified.

    Over all projections that are patched. An expert that was given no position is grey.

    Args:
        report: of a model whose experts are patched.
        ax: where to draw; None for a figure of its own.

    Raises:
        TokenGateError: it is no report, or has no expert.
    """
    counts: dict[str, dict[int, list[int]]] = {}
    for name, module in check_report("experts", report).modules.items():
        found = EXPERT.search(name)
        if found:
            own = counts.setdefault(name[: found.start()], {}).setdefault(int(found[2]), [0, 0])
            own[0] += module.modified
            own[1] += module.positions
    if not counts:
        raise TokenGateError(
            "experts was given a report without an expert: patch experts, and record the model."
        )
    width = 1 + max(max(row) for row in counts.values())
    values = np.full((len(counts), width), math.nan)
    for y, row in enumerate(counts.values()):
        for x, (modified, positions) in row.items():
            if positions:
                values[y, x] = 100 * modified / positions
    if ax is None:
        ax = Picture(2.2 + 0.16 * width, max(1.2 + 0.24 * len(counts), 2.0)).subplots()
    colours = matplotlib.colormaps[COLOUR_MAP].with_extremes(bad=NOTHING)
    image = ax.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto")
    ax.set_yticks(range(len(counts)), list(counts), fontsize=8)
    ax.set_xlabel("expert")
    ax.set_title("routed positions that were modified", fontsize=10)
    _figure(ax).colorbar(image, ax=ax, label="modified (%)")
    return _figure(ax)


def trajectories(
    histories: tokengate.History | Mapping[str, tokengate.History],
    modules: Sequence[str] | None = None,
) -> Figure:
    """Loss, tau and sparsity over the steps of a training, the shape of the paper's Figure 9.

    A line of tau for every gate, in the colour of its projection; of sparsity, from 0 to 100 %, the
    average of every projection, and in bold black that of all.

    Args:
        histories: one, or several by the titles of their columns, on the same scales.
        modules: the gates to draw, by name; None for all.

    Raises:
        TokenGateError: there is no history, or a module is in none of them.
    """
    if isinstance(histories, tokengate.History):
        histories = {"": histories}
    if not isinstance(histories, Mapping) or not histories:
        raise TokenGateError(
            "trajectories was given no history: pass a tokengate.History, or several by title."
        )
    shown = dict.fromkeys(name for history in histories.values() for name in history.taus)
    for name in modules or ():
        if name not in shown:
            raise TokenGateError(
                f"no history has a gate in {name!r}: pass modules=None for all, or some of them, "
                f"e.g. {next(iter(shown), 'none')!r}."
            )
    shown = {name: None for name in shown if modules is None or name in modules}
    rows = ["loss"] if any(_has(h.losses) for h in histories.values()) else []
    rows += ["tau"]
    if any(_has(h.sparsity) for h in histories.values()):
        rows += ["sparsity (%)"]
    figure = Picture(1.6 + 3.6 * len(histories), 0.9 + 1.8 * len(rows))
    grid = figure.subplots(len(rows), len(histories), sharex="col", sharey="row", squeeze=False)
    projections = _by_projection(shown)
    for column, (title, history) in zip(grid.T, histories.items(), strict=True):
        column[0].set_title(title, fontsize=10)
        column[-1].set_xlabel("step")
        panels = dict(zip(rows, column, strict=True))
        if "loss" in panels:
            panels["loss"].plot(history.steps, _numbers(history.losses), "k", linewidth=0.9)
        for (projection, names), style in zip(projections.items(), _styles(), strict=False):
            for i, name in enumerate(name for name in names if name in history.taus):
                label = projection if i == 0 else "_"
                taus = _numbers(history.taus[name])
                panels["tau"].plot(history.steps, taus, label=label, linewidth=0.9, **style)
            if "sparsity (%)" in panels:
                average = _average([history.sparsities.get(name, []) for name in names])
                panels["sparsity (%)"].plot(
                    history.steps[: len(average)], average, linewidth=0.9, **style
                )
        if "sparsity (%)" in panels:
            average = _average([history.sparsities.get(name, []) for name in shown])
            panels["sparsity (%)"].plot(
                history.steps[: len(average)], average, "k", linewidth=1.8, label="mean of all"
            )
            panels["sparsity (%)"].set_ylim(-3, 103)  # always the same, with room for the lines
    for label, ax in zip(rows, grid[:, 0], strict=True):
        ax.set_ylabel(label)
    for ax in grid.flat:
        ax.grid(alpha=0.3)
    # Every projection once, also one that a later column alone has.
    named: dict[str, Any] = {}
    for ax in grid[rows.index("tau") :].flat:
        for line, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, line)
    figure.legend(named.values(), named, loc="outside center right", fontsize=8)
    figure.suptitle("tau of every gate, and what it leaves unmodified", fontsize=11)
    return figure


def ratios(report: SparsityReport) -> Figure:
    """How r = ||M(x)|| / ||W0 x|| is distributed in every layer, with tau marked (eq. 4).

    One panel for each projection, one row for each layer, the darker the more positions. What lies
    left of a layer's mark is left unmodified. A tau <= 0, which closes nothing, has no mark. What
    has r below 2^-24, as where M(x) = 0, or from 2^16 on is not drawn.

    Args:
        report: of `tokengate.record(model, ratios=True)`.

    Raises:
        TokenGateError: it is no report, or has no r.
    """
    edges = check_report("ratios", report).histogram("r").edges
    found = {name: m for name, m in report.modules.items() if m.ratios is not None}
    rows, columns, names = name_grid(found)
    figure = Picture(1.2 + 2.2 * len(columns), max(1.3 + 0.24 * len(rows), 2.6))
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for ax, title, column in zip(panels, columns, zip(*names, strict=True), strict=True):
        for y, name in enumerate(column):
            if name is None:
                continue
            _, *counts, _ = found[name].ratios or ()
            filled = [i for i, count in enumerate(counts) if count > 0]
            if filled:
                first, last = filled[0], filled[-1] + 1
                shares = [[count / max(counts) for count in counts[first:last]]]
                ends = [y - 0.4, y + 0.4]
                ax.pcolormesh(edges[first : last + 1], ends, shares, cmap="Greys", vmin=0, vmax=1)
            tau = found[name].tau
            if tau is not None and tau > 0:
                ax.plot([tau, tau], [y - 0.5, y + 0.5], color=COLOURS[1], linewidth=2.5)
        ax.set(xscale="log", xlabel="r")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(title, fontsize=10)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=8)
    panels[0].set(ylabel="layer", ylim=(len(rows) - 0.4, -0.6))
    figure.suptitle(
        "r = ||M(x)|| / ||W0 x||; left of tau, in orange, nothing is modified", fontsize=10
    )
    return figure


def performance(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    ax: Axes | None = None,
    *,
    score: str = "score",
) -> Figure:
    """Scores against the share of modules that were adapted, the shape of the paper's Figure 8.

    Mean and standard deviation (of a sample) over the runs; one run has no error bar. Curves lie a
    little beside each other, so that all bars are seen.

    Args:
        curves: for each way to choose modules, by name, the scores of all runs by the share of
            modules, in [0, 1].
        ax: where to draw; None for a figure of its own.
        score: the label of the scores.

    Raises:
        TokenGateError: a share lies outside [0, 1], or has no score.
    """
    for label, curve in curves.items():
        for share, scores in curve.items():
            if not 0 <= share <= 1 or not len(scores):
                raise TokenGateError(
                    f"the curve {label!r} has {len(scores)} scores at a share of {share:g}: "
                    "pass one or more scores at shares in [0, 1]."
                )
    if ax is None:
        ax = Picture(5, 3.4).subplots()
    step = min(1.0, 8 / len(curves)) if curves else 0.0
    for i, ((label, curve), style, marker) in enumerate(
        zip(curves.items(), _styles(), itertools.cycle(MARKERS), strict=False)
    ):
        points = sorted(curve.items())
        beside = step * (i - (len(curves) - 1) / 2)
        ax.errorbar(
            [100 * share + beside for share, _ in points],
            [statistics.fmean(scores) for _, scores in points],
            [statistics.stdev(scores) if len(scores) > 1 else 0.0 for _, scores in points],
            marker=marker, markersize=5, capsize=3, label=label, **style,
        )  # fmt: skip
    ax.set(xlabel="modules adapted (%)", ylabel=score, xlim=(-6, 106))
    ax.set_title(f"{score} by the share of modules that are adapted", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return _figure(ax)


def pixels(figure: Figure) -> np.ndarray:
    """What a figure looks like: `(height, width, 3)`, 8 bits each of red, green and blue."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def _styles() -> Iterator[dict[str, Any]]:
    """Colours, again with other dashes when these are used up, and from the start after them."""
    return itertools.cycle({"color": c, "linestyle": dash} for dash in DASHES for c in COLOURS)


def _by_projection(names: Iterable[str]) -> dict[str, list[str]]:
    _, columns, grid = name_grid(names)
    columns_of_names = zip(*grid, strict=True)
    return {
        c: [n for n in found if n is not None]
        for c, found in zip(columns, columns_of_names, strict=True)
    }


def _has(course: Iterable[float | None]) -> bool:
    return any(value is not None for value in course)


def _numbers(course: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in course]


def _average(courses: Iterable[Sequence[float | None]]) -> list[float]:
    """In percent, at every step over those that have a value there."""
    steps = (
        [v for v in step if v is not None] for step in zip(*filter(None, courses), strict=True)
    )
    return [100 * statistics.fmean(values) if values else math.nan for values in steps]
