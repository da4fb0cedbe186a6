"""Tables and pictures of what comparison.py has done so far.

A cell's seeds are those that were trained with what its first seed was best with on the validation
part; differences are to the ungated run of the same seed, which was tuned, or not, alike.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparison_runs import VARIANTS, Settings
from comparison_tasks import TASKS

BEGIN, END = "<!-- tables: comparison.py --tables -->", "<!-- end of tables -->"
Found = dict[str, Any]
RATES = 3  # that were tried, where a cell counts as tuned


@dataclass(frozen=True)
class Row:
    """The runs of one cell by their seeds."""

    settings: Settings
    runs: dict[int, Found]

    def scores(self) -> dict[int, float]:
        """On the test part."""
        return {seed: run["score"]["test"] for seed, run in self.runs.items()}

    def sparsity(self) -> list[float]:
        """Held out, in percent."""
        return [100 * run["sparsity"]["test"] for run in self.runs.values()]

    def drifts(self) -> list[float]:
        """KL(base || adapted), in nats."""
        return [run["drift"] for run in self.runs.values()]


def rows_of(found: Iterable[Found], tuned: bool) -> dict[Settings, Row]:
    """By settings without those that are tuned; at the default rate alone, or at the best."""
    cells: dict[Settings, list[Settings]] = defaultdict(list)
    results: dict[Settings, Found] = {}
    for one in found:
        settings = Settings(**one["settings"])
        results[settings] = one
        cells[replace(settings, lr=0.0, seed=0, knob=None)].append(settings)
    rows: dict[Settings, Row] = {}
    for cell, runs in cells.items():
        task = TASKS[cell.task]
        first = [s for s in runs if s.seed == 0]
        if tuned and len({s.lr for s in first}) < RATES:
            continue
        by_rate = {
            lr: min(
                (s for s in first if s.lr == lr),
                key=lambda s: abs(results[s]["sparsity"]["validation"] - s.sparsity),
            )
            for lr in {s.lr for s in first}
        }
        if not tuned and task.rates[1] not in by_rate:
            continue
        if tuned:
            best = max(
                by_rate.values(), key=lambda s: task.sign * results[s]["score"]["validation"]
            )
        else:
            best = by_rate[task.rates[1]]
        same = [s for s in runs if replace(s, seed=0) == best]
        rows[cell] = Row(best, {s.seed: results[s] for s in sorted(same, key=lambda s: s.seed)})
    return rows


def table(cells: dict[Settings, Row], task: str, **fixed: Any) -> str:
    """One task's variants at one sparsity, rank and number of rows, as Markdown; "" if none."""
    wanted = {"method": "lora", "rank": TASKS[task].rank, "sparsity": 0.6, "rows": None} | fixed
    base = Settings(task, "ungated", **{**wanted, "sparsity": 0.0}, lr=0.0)
    plain = cells.get(base)
    if plain is None:
        return ""
    digits = 3 if TASKS[task].sign < 0 else 1
    lines = [
        f"| | {TASKS[task].measure} | - ungated | not modified (%) | drift (nats) | rate | seeds |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for name, variant in VARIANTS.items():
        row = cells.get(replace(base, variant=name, sparsity=wanted["sparsity"]))
        row = plain if name == "ungated" else row
        if row is None:
            continue
        lines.append(line(variant.label, row, plain, digits))
        if name == "ungated":
            lines.append(scaled(row, digits))
    return "\n".join(lines) + "\n" + held(cells, plain, replace(base, sparsity=wanted["sparsity"]))


def held(cells: dict[Settings, Row], plain: Row, base: Settings) -> str:
    """What the layers that `suggest` named have of the scores of the ungated runs, in words."""
    row = cells.get(replace(base, variant="suggest"))
    named: list[float] = []
    best: list[float] = []
    for seed in row.runs.keys() & plain.runs.keys() if row else ():
        names, scores = row.runs[seed]["named"], plain.runs[seed]["fisher"]
        ordered = sorted(scores.values(), reverse=True)
        named.append(sum(scores[name] for name in names) / sum(ordered))
        best.append(sum(ordered[: len(names)]) / sum(ordered))
    if not named:
        return ""
    return (
        f"\nThe layers that `suggest` named have {spread(named, '.2f')} of the ungated runs' "
        f"`fisher_scores`; those with the highest {spread(best, '.2f')}, and layers drawn by lot "
        f"{1 - base.sparsity:.2g}.\n"
    )


def line(label: str, row: Row, plain: Row, digits: int) -> str:
    """One row; no difference for the ungated one itself."""
    less = [] if row is plain else differences(row.scores(), plain.scores())
    cells = [
        label,
        spread(row.scores().values(), f".{digits}f"),
        spread(less, f"+.{digits}f"),
        spread(row.sparsity(), ".1f"),
        spread(row.drifts(), ".3f"),
        f"{row.settings.lr:g}",
        str(len(row.runs)),
    ]
    return "| " + " | ".join(cells) + " |"


def scaled(row: Row, digits: int) -> str:
    """The ungated runs with M(x) x 0.8 at test."""
    parts = {seed: run["scaled"][0] for seed, run in row.runs.items()}
    scores = {seed: part["test"] for seed, part in parts.items()}
    cells = [
        f"ungated, {next(iter(parts.values()))['scale']:g} M(x) at test",
        spread(scores.values(), f".{digits}f"),
        spread(differences(scores, row.scores()), f"+.{digits}f"),
        "0.0",
        spread([part["drift"] for part in parts.values()], ".3f"),
        f"{row.settings.lr:g}",
        str(len(parts)),
    ]
    return "| " + " | ".join(cells) + " |"


def differences(scores: dict[int, float], base: dict[int, float]) -> list[float]:
    """Within a seed, of those that both have."""
    return [scores[seed] - base[seed] for seed in scores if seed in base]


def spread(values: Collection[float], form: str) -> str:
    """Mean and standard deviation of a sample."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ({statistics.stdev(values):{form.removeprefix('+')}})"


def text(found: list[Found]) -> str:
    """All tables, each under what it is of."""
    parts: list[str] = []
    for tuned in (False, True):
        rows = rows_of(found, tuned)
        how = "a rate tuned for each" if tuned else "one rate for all"
        for task, kind in TASKS.items():
            doc = (kind.__doc__ or "").splitlines()[0]
            settings = {(s.rank, s.rows) for s in rows if s.task == task and s.method == "lora"}
            for rank, count in sorted(settings, key=str):
                sparsities = {
                    s.sparsity for s in rows
                    if (s.task, s.rank, s.rows) == (task, rank, count) and s.sparsity
                } or {0.6}  # fmt: skip
                for sparsity in sorted(sparsities):
                    one = table(rows, task, rank=rank, rows=count, sparsity=sparsity)
                    data = "all rows" if count is None else f"{count} rows"
                    if one:
                        title = f"rank {rank}, {sparsity:.0%}, {data}, {how}"
                        parts.append(f"**{doc}** {title}:\n\n{one}")
            one = table(rows, task, method="dora")
            if one:
                parts.append(f"**{doc}** DoRA, {how}:\n\n{one}")
    return "\n".join(parts)


def draw(found: list[Found], path: Path) -> None:
    """Cost over sparsity and over rank at one rate for all, a panel for each task that has some."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(found, tuned=False)
    along = ("sparsity", "rank")
    shown = ("threshold", "fisher", "firm", "select", "random")
    tasks = [task for task in TASKS if any(s.task == task for s in rows)]
    # What has one point alone is no curve.
    tasks = [
        task for task in tasks
        if any(len(list(curve(rows, task, v, axis))) > 1 for v in shown for axis in along)
    ] or tasks  # fmt: skip
    shape = {"figsize": (5 * len(tasks), 6.4), "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(2, len(tasks), **shape)
    for column, task in enumerate(tasks):
        for axes, axis in zip(grid[:, column], along, strict=True):
            for number, variant in enumerate(shown):
                points = sorted(curve(rows, task, variant, axis))
                if points:
                    x, y, deviation = zip(*points, strict=True)
                    style = {"color": f"C{number}", "label": VARIANTS[variant].label}
                    axes.errorbar(x, y, deviation, fmt="o-", capsize=2, ms=4, **style)
            axes.axhline(0, color="grey", lw=0.8)
            axes.set(xlabel=axis, ylabel=f"{TASKS[task].measure} - ungated", title=task)
            axes.grid(alpha=0.3)
        grid[0, column].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle("One rate for all")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curve(
    rows: dict[Settings, Row], task: str, variant: str, axis: str
) -> Iterable[tuple[float, float, float]]:
    """What a variant costs along one axis, the other as it is in the tables: (x, mean, std)."""
    for cell, row in rows.items():
        usual = {"sparsity": 0.6, "rank": TASKS[task].rank, "rows": None, "method": "lora"}
        usual.pop(axis)
        if (cell.task, cell.variant) != (task, variant) or any(
            getattr(cell, name) != value for name, value in usual.items()
        ):
            continue
        plain = rows.get(replace(cell, variant="ungated", sparsity=0.0))
        less = differences(row.scores(), plain.scores()) if plain else []
        if less:
            deviation = statistics.stdev(less) if len(less) > 1 else 0.0
            yield getattr(cell, axis), statistics.fmean(less), deviation


def into(page: Path, tables: str) -> None:
    """Put the tables between their marks on a page."""
    old = page.read_text()
    before, rest = old.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{rest.split(END)[1]}")
