"""What the runs of a recipe gave, in the shape of the paper's Tables 1 to 3, and as a picture."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"lora": "LoRA", "dora": "DoRA", "adalora": "AdaLoRA", "adapter": "Adapter"}
AVERAGE = "avg"

Cells = dict[tuple[str, str], dict[str, dict[int, float]]]  # (method, gate): test: seed: value


def write(found: list[dict[str, Any]], folder: Path) -> str:
    """table.md and results.png of all runs; returns the table."""
    scores = cells(found, "scores")
    sparsities = {name: cells(found, name) for name in found[0] if name.startswith("sparsity")}
    drifts = {name: cells(found, name) for name in found[0] if name.startswith("drift")}
    text = table(scores, sparsities, max(one.get("decimals", 1) for one in found), drifts)
    keep_text(folder / "table.md", text)
    draw(scores, sparsities["sparsity"], folder / "results.png")
    return text


def keep(path: Path, make: Callable[[Path], Any]) -> None:
    """Let `make` write a file that is there whole or not at all, should it be interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".part")
    make(new)
    os.replace(new, path)


def keep_text(path: Path, text: str) -> None:
    """The same of a text."""
    keep(path, lambda new: new.write_text(text))


def cells(found: list[dict[str, Any]], what: str) -> Cells:
    """Values by method and gate, test and seed; with an average where no test lacks."""
    values: Cells = {}
    for one in found:
        settings = one["settings"]
        rows = values.setdefault((settings["method"], settings["gate"]), {})
        for test, value in one.get(what, {}).items():
            rows.setdefault(test, {})[settings["seed"]] = value
    tests = {test for rows in values.values() for test in rows}
    for rows in values.values():
        if len(rows) == len(tests) > 1:
            seeds = set.intersection(*(set(each) for each in rows.values()))
            average = {s: statistics.fmean(rows[test][s] for test in tests) for s in seeds}
            rows[AVERAGE] = average
    return values


def table(
    scores: Cells,
    sparsities: dict[str, Cells],
    decimals: int = 1,
    drifts: dict[str, Cells] | None = None,
) -> str:
    """Mean (standard deviation) over the seeds, as Markdown.

    Each row is followed by how far the model is from its base, and a gated one by its sparsity,
    overall and of parts, and by what it scores above the ungated one of the same seed. Scores have
    so many `decimals`, drifts three, and the sparsity one.
    """
    tests = list(dict.fromkeys(test for rows in scores.values() for test in rows))
    lines = ["| | " + " | ".join(tests) + " |", "|:--|" + "--:|" * len(tests)]

    def add(label: str, rows: dict[str, dict[int, float]], form: str) -> None:
        found = [spread(list(rows.get(test, {}).values()), form) for test in tests]
        lines.append(f"| {label} | " + " | ".join(found) + " |")

    for (method, gate), rows in scores.items():
        add(label_of(method, gate), rows, f".{decimals}f")
        for name, drift in (drifts or {}).items():
            add(name, drift[method, gate], ".3f")
        if gate == "off":
            continue
        for name, sparsity in sparsities.items():
            add(f"{name} (%)", sparsity[method, gate], ".1f")
        ungated = scores.get((method, "off"), {})
        if ungated:
            more = {
                test: {s: v - ungated[test][s] for s, v in each.items() if s in ungated[test]}
                for test, each in rows.items()
                if test in ungated
            }
            add(f"{label_of(method, gate)} - {NAMES[method]}", more, f"+.{decimals}f")
    return "\n".join(lines) + "\n"


def label_of(method: str, gate: str) -> str:
    """As the paper writes it, and the sparsity that was to be reached."""
    name = NAMES[method]
    return name if gate == "off" else f"{name}_S" if gate == "on" else f"{name}_S {gate}"


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation (of a sample); one value has none, and no value is a gap."""
    if not values:
        return ""
    mean, deviation = middle(values)
    return f"{mean:{form}}" + f" ({deviation:{form.removeprefix('+')}})" * (len(values) > 1)


def draw(scores: Cells, sparsity: Cells, path: Path) -> None:
    """Score over sparsity, a panel for each test; bars are standard deviations over the seeds.

    All panels are as many points of score high, so that a slope means the same in each.
    """
    tests = list(dict.fromkeys(test for rows in scores.values() for test in rows))
    methods = list(dict.fromkeys(method for method, _ in scores))
    across = min(4, len(tests))
    down = -(-len(tests) // across)
    size = (0.6 + 2.6 * across, 0.6 + 2.3 * down)
    figure, grid = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    middles: list[tuple[Any, float]] = []
    height = 1.0
    for axes, test in zip(grid.flat, tests, strict=False):
        ends: list[float] = []
        for colour, method in enumerate(methods):
            points = sorted(
                (*middle(sparsity[key][test].values()), *middle(rows[test].values()))
                for key, rows in scores.items()
                if key[0] == method and test in rows
            )
            if points:
                x, dx, y, dy = zip(*points, strict=True)
                ends += [end for at, by in zip(y, dy, strict=True) for end in (at - by, at + by)]
                beside = 0.8 * (colour - (len(methods) - 1) / 2)  # so that all bars are seen
                axes.errorbar(
                    [at + beside for at in x], y, dy, dx, fmt="o-", capsize=2, ms=4, lw=1,
                    color=f"C{colour}", label=NAMES[method],
                )  # fmt: skip
        axes.set_title("average" if test == AVERAGE else test, fontsize=9)
        axes.set_xlim(-5, 105)
        axes.grid(alpha=0.3)
        middles.append((axes, (min(ends) + max(ends)) / 2))
        height = max(height, 1.1 * (max(ends) - min(ends)))
    for axes, at in middles:
        axes.set_ylim(at - height / 2, at + height / 2)
    for empty in grid.flat[len(tests) :]:
        empty.remove()
    grid.flat[0].legend(fontsize=7)
    figure.supxlabel("sparsity: positions left unmodified (%)", fontsize=9)
    figure.supylabel(f"score; every panel is {height:.3g} high", fontsize=9)
    figure.suptitle("Score by sparsity, mean and standard deviation over the seeds", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def middle(values: Collection[float]) -> tuple[float, float]:
    """Mean and standard deviation; of one value it is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
