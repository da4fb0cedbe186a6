"""Does a gate help? Every gate beside what is simpler, each with a learning rate tuned for it.

    python examples/analysis/comparison.py --data DATA --output outputs/comparison

Four tasks (`comparison_tasks.py`), ten variants (`comparison_runs.py`). Each cell of the tables is
tuned on the validation part at the first seed, over three learning rates and further ones while the
best is at an end, and then trained with the other seeds. A variant whose sparsity hangs on a knob,
as the paper's on lambda, has that searched at every rate. What is done is a line in results.jsonl,
and is not done again: interrupt it at will. The most telling cells come first; `--only` takes those
whose name has one of its words. `--tables` makes tables and pictures of what there is.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import tokengate

# The data, the models and how results are kept are the recipes'.
sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "recipes"))

import comparison_results
from comparison_runs import VARIANTS, Settings, perform
from comparison_task import Task
from comparison_tasks import TASKS

NEAR, SEARCHES, EXTENSIONS = 0.03, 6, 2


@dataclass(frozen=True)
class Cell:
    """What has one line in a table: settings, but for those that are tuned, and its seeds."""

    settings: Settings
    seeds: int = 3
    tuned: bool = True

    @property
    def name(self) -> str:
        """For `--only` and the progress bar."""
        s = self.settings
        rows = "all" if s.rows is None else s.rows
        return f"{s.task}/{s.variant}/{s.method}/r{s.rank}/{s.sparsity:g}/rows-{rows}"


class Results:
    """What was done, a line each; a line that was cut off is done again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, dict[str, Any]] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                one = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.found[Settings(**one["settings"]).key()] = one

    def add(self, settings: Settings, found: dict[str, Any]) -> dict[str, Any]:
        """Keep one."""
        on = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
        one = {"settings": asdict(settings), **found, "on": on}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(one) + "\n")
        self.found[settings.key()] = one
        return one


class Lab:
    """Runs what is missing."""

    def __init__(self, data: Path, output: Path) -> None:
        self.results = Results(output / "results.jsonl")
        self.tasks = {name: kind(data, output / "cache") for name, kind in TASKS.items()}

    def run(self, settings: Settings) -> dict[str, Any]:
        """The results of one run."""
        known = self.results.found.get(settings.key())
        if known is not None:
            return known
        plain = None
        if VARIANTS[settings.variant].left_out == "select":
            plain = self.run(settings.plain())
        task: Task = self.tasks[settings.task]
        return self.results.add(settings, perform(task, settings, plain))

    def cell(self, cell: Cell) -> Iterator[None]:
        """Everything of one cell, a run after the other."""
        task, first = self.tasks[cell.settings.task], replace(cell.settings, seed=0)
        rates = list(task.rates) if cell.tuned else [task.rates[1]]
        found: dict[float, tuple[Settings, float]] = {}
        for extension in range(EXTENSIONS + 1):
            for lr in rates:
                if lr not in found:
                    chosen = yield from self.searched(replace(first, lr=lr))
                    score = task.sign * self.run(chosen)["score"]["validation"]
                    found[lr] = chosen, score
            best = max(found, key=lambda lr: found[lr][1])
            if not cell.tuned or min(found) < best < max(found) or extension == EXTENSIONS:
                break
            rates = [best / 2 if best == min(found) else best * 2]
        for seed in range(1, cell.seeds):
            self.run(replace(found[best][0], seed=seed))
            yield

    def searched(self, settings: Settings) -> Any:
        """The settings with the knob whose validation sparsity is nearest to the one wanted."""
        if VARIANTS[settings.variant].knob is None:
            self.run(settings)
            yield
            return settings
        start, step = VARIANTS[settings.variant].knob
        known = [
            s for one in self.results.found.values()
            if (s := Settings(**one["settings"])).knob is not None
            and replace(s, lr=settings.lr, knob=None, seed=0) == settings
        ]  # fmt: skip
        # An interrupted search goes on; one at another rate begins where the last one ended.
        tried = {s.knob: self._closed(s) for s in known if (s.lr, s.seed) == (settings.lr, 0)}
        if known:
            start = min(known, key=lambda s: abs(self._closed(s) - s.sparsity)).knob

        def miss(knob: float) -> float:
            return abs(tried[knob] - settings.sparsity)

        while len(tried) < SEARCHES and min(map(miss, tried), default=1.0) > NEAR:
            knob = _next(tried, settings.sparsity, step) if tried else start
            tried[knob] = self._closed(replace(settings, knob=knob))
            yield
        return replace(settings, knob=min(tried, key=miss))

    def _closed(self, settings: Settings) -> float:
        return self.run(settings)["sparsity"]["validation"]


def _next(tried: dict[float, float], target: float, step: float) -> float:
    """Between the last below and the first above; beyond the end where all are on one side."""
    below = [k for k in tried if tried[k] < target]
    above = [k for k in tried if tried[k] >= target]
    if not above:
        return max(below) + step * 2 ** (len(below) - 1)
    if not below:
        return min(above) - step * 2 ** (len(above) - 1)
    low, high = max(below), min(above)
    # Not on either end, where a curve bends.
    share = min(0.8, max(0.2, (target - tried[low]) / (tried[high] - tried[low])))
    return round(low + share * (high - low), 4)


def planned() -> list[Cell]:
    """All cells, the most telling first."""
    cells: list[Cell] = []

    def add(task: str, variant: str, seeds: int = 3, tuned: bool = True, **more: Any) -> None:
        sparsity = more.pop("sparsity", 0.6)
        if variant in ("ungated",):
            sparsity = 0.0
        rank = more.pop("rank", TASKS[task].rank)
        settings = Settings(task, variant, rank=rank, sparsity=sparsity, **more)
        cell = Cell(settings, seeds, tuned)
        if cell not in cells:
            cells.append(cell)

    quick, slow = ("stories", "vit"), ("mrpc", "cola")
    main = ("ungated", "threshold", "fisher", "select")
    rest = ("threshold-led", "firm", "rank", "random", "suggest", "sigmoid")
    # At one rate, then at each one's own; five seeds where the differences are smallest.
    for tuned in (False, True):
        for task in quick:
            for variant in main:
                five = task == "vit" and variant != "select"
                add(task, variant, 5 if five else 3, tuned)
        for variant in rest:
            for task in quick:
                add(task, variant, tuned=tuned)
    for tuned in (False, True):
        for variant in (*main, *rest):
            for task in slow:
                add(task, variant, tuned=tuned)
    for tuned in (False, True):
        for sparsity in (0.8, 0.3, 0.9):
            for variant in ("fisher", "select", "threshold"):
                for task in quick:
                    add(task, variant, tuned=tuned, sparsity=sparsity)
        for rank in (32, 16, 4, 64):
            for variant in main:
                for task in quick:
                    add(task, variant, tuned=tuned, rank=rank)
        for rows in (64, 256):
            for variant in main:
                for task in quick:
                    add(task, variant, tuned=tuned, rows=rows)
        for variant in ("ungated", "threshold", "fisher"):
            for task in (*quick, *slow):
                add(task, variant, tuned=tuned, method="dora")
    return cells


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder of weights/, text/, vision/ and glue/")
    add("--output", type=Path, default=Path("outputs/comparison"))
    add("--only", nargs="+", default=[""], help="cells whose name has one of these words")
    add("--without", nargs="+", default=[], help="and none of these")
    add("--seeds", type=int, help="at most so many")
    add("--untuned", action="store_true", help="at the default rate alone")
    add("--tables", action="store_true", help="tables.md and curves.png of what is done")
    add("--page", type=Path, help="with --tables: a page to put them into, between its marks")
    add("--plan", action="store_true", help="print the cells")
    return parser.parse_args()


def main() -> None:
    """Run what is missing."""
    args = parse_arguments()
    cells = [
        cell for cell in planned()
        if any(word in cell.name for word in args.only)
        and not any(word in cell.name for word in args.without)
        and not (args.untuned and cell.tuned)
    ]  # fmt: skip
    if args.plan:
        print("\n".join(f"{cell.name}{' tuned' * cell.tuned}" for cell in cells))
        return
    if args.tables:
        found = list(Results(args.output / "results.jsonl").found.values())
        tables = comparison_results.text(found)
        (args.output / "tables.md").write_text(tables)
        comparison_results.draw(found, args.output / "curves.png")
        if args.page:
            comparison_results.into(args.page, tables)
        print(tables)
        return
    torch.set_num_threads(1)
    lab = Lab(args.data, args.output)
    reasons = {name: task.lacks() for name, task in lab.tasks.items()}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is left out: {reason}")
    cells = [cell for cell in cells if not reasons[cell.settings.task]]
    with tqdm(cells, unit="cell") as progress:
        for cell in progress:
            if args.seeds:
                cell = replace(cell, seeds=min(args.seeds, cell.seeds))
            try:
                for count, _ in enumerate(lab.cell(cell), 1):
                    progress.set_description(f"{cell.name}, run {count}")
            except (tokengate.TokenGateError, AttributeError):
                traceback.print_exc()


if __name__ == "__main__":
    main()
