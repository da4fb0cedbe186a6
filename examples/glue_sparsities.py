"""What a wanted sparsity costs: one GLUE task ungated and at several targets, over several seeds.

    python examples/glue_sparsities.py --task cola --data path/to/CoLA

Options other than those below are those of finetune_glue.py, and the same for all runs. Runs that
`--output` has already are not repeated, so that an interrupted sweep goes on where it was. It
writes table.md, mean (standard deviation) over the seeds, and sparsities.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
from finetune_glue import parse, parser, plain, run
from glue_data import TASKS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

UNGATED = "ungated"


def measure(args: argparse.Namespace, target: float | None, seed: int) -> dict:
    """The results of one run, from its file if it is there."""
    name = UNGATED if target is None else f"target-{target}"
    folder = args.output / name / f"seed-{seed}"
    own = {"target_sparsity": target, "ungated": target is None, "seed": seed, "output": folder}
    one = argparse.Namespace(**{**vars(args), **own})
    if not (folder / "results.json").exists():
        run(one)
    results = json.loads((folder / "results.json").read_text())
    for option, value in plain(one).items():
        found = results["arguments"].get(option, value)
        if found != value and option not in ("targets", "seeds", "output"):
            raise SystemExit(
                f"{folder} has a run with {option}={found}, and {value} was asked: pass another "
                "--output."
            )
    return results


def in_training(results: dict) -> float:
    """Sparsity over the last tenth of the steps that were logged; 0 without a gate."""
    seen = [entry["sparsity"] for entry in results["log"] if "sparsity" in entry]
    return statistics.fmean(seen[-max(1, len(seen) // 10) :])


def spread(values: list[float]) -> str:
    """Mean and standard deviation (of a sample)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ({deviation:.3f})"


def draw(rows: list[tuple[str, list[float], list[float]]], metric: str, path: Path) -> None:
    """The metric over the sparsity held out, every run a point."""
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for label, sparsities, scores in rows:
        axes.plot([100 * s for s in sparsities], scores, "o", label=label)
    axes.set(xlabel="positions left unmodified, held out (%)", ylabel=metric, xlim=(-3, 100))
    axes.legend(title="target")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run what is missing, then print the table."""
    options = parser()
    options.description = __doc__.split("\n")[0]
    options.add_argument("--targets", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.set_defaults(output=Path("outputs/glue_sparsities"))
    args = parse(options)
    wanted = (None, *args.targets)
    each = {seed: [measure(args, target, seed) for target in wanted] for seed in args.seeds}
    metric = TASKS[args.task].metrics[0]
    lines = [f"| target | sparsity in training | held out | {metric} |", "|:--|--:|--:|--:|"]
    rows = []
    for target, *found in zip(wanted, *each.values(), strict=True):
        label = UNGATED if target is None else str(target)
        trained = [in_training(results) for results in found]
        held_out = [results["report"]["sparsity"] for results in found]
        scores = [results["metrics"][f"eval_{metric}"] for results in found]
        lines.append(f"| {label} | {spread(trained)} | {spread(held_out)} | {spread(scores)} |")
        rows.append((label, held_out, scores))
    table = "\n".join(lines) + "\n"
    (args.output / "table.md").write_text(table)
    draw(rows, metric, args.output / "sparsities.png")
    print(table)


if __name__ == "__main__":
    main()
