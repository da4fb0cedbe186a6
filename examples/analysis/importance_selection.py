"""Which modules matter: Table 4 and Figure 8 of the paper, on the quickstart's vision transformer.

A first run on all modules is measured: gated for sparsity, ungated for the norms of its
modifications, and for what the loss has of each module (fisher, a row that the paper does not
have). Then modules are selected by these, and the base is adapted anew on them alone, without
gates. Nothing is downloaded; two cores need under twenty minutes.

    python examples/analysis/importance_selection.py

A run that `--output` has already is not repeated, so that what was interrupted goes on where it
was. Written there: results.csv with every run, table.md, which is Table 4 at `--percent`, and
selection.png, which is Figure 8. Everything is done with `--seeds`, each of which has a base, a
head and an order of batches of its own, the same in all of its runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import tokengate

# The quickstart's model and the recipes' results lie in folders beside this one.
sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in (".", "recipes"))

from quickstart import Split, accuracy, adapt, load_images, pretrain, small_vit
from recipe_results import keep, keep_text, middle, spread

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GATED, ALL = "gated, all modules", "all modules"  # the first runs, and the baseline of the others
LOW = "S_low"
# Table 4's names of its rows, in words.
SPOKEN = {
    "S_high": "highest sparsity first",
    "norm_relative": "largest ||M(x)|| / ||W0 x|| first",
    "norm_abs": "largest ||M(x)|| first",
    "fisher": "most of the loss first",
    "half_rank": "all of them, at half the rank",
}


@dataclass(frozen=True)
class Run:
    """One training: how its modules are selected, how many percent of them, which random draw."""

    row: str
    percent: int = 100
    draw: int = 0

    def file(self, folder: Path) -> Path:
        """Where its results are kept."""
        name = self.row.replace(",", "").replace(" ", "-")
        return folder / f"{name}-{self.percent}-{self.draw}.json"


def planned(args: argparse.Namespace) -> list[Run]:
    """What is run with every seed; the first runs come first."""
    rows = [LOW, "S_high", "norm_relative", "norm_abs", "fisher", "half_rank"]
    runs = [Run(GATED), Run(ALL), *(Run(row, args.percent) for row in rows)]
    runs += [Run("random", args.percent, draw) for draw in range(args.draws)]
    return runs + [
        Run(LOW, percent) for percent in args.sweep if percent not in (args.percent, 100)
    ]


def selected(run: Run, folder: Path) -> list[str]:
    """The modules that this run adapts, from what the first ones measured."""
    sparsity = json.loads(Run(GATED).file(folder).read_text())["sparsity"]
    ungated = json.loads(Run(ALL).file(folder).read_text())
    norms = ungated["norms"]
    share = run.percent / 100
    if run.row == "random":
        return tokengate.select(sparsity, share, by="random", seed=run.draw)
    if run.row == "half_rank":
        return tokengate.select(sparsity, 1.0)
    if run.row == "fisher":
        if "fisher" not in ungated:
            raise SystemExit(f"{folder} is of a time before the row fisher: pass another --output.")
        return tokengate.select(ungated["fisher"], share, by="fisher")
    numbers, keep = {
        LOW: (sparsity, "lowest"),
        "S_high": (sparsity, "highest"),
        "norm_relative": (norms["relative"], "highest"),
        "norm_abs": (norms["absolute"], "highest"),
    }[run.row]
    return tokengate.select(numbers, share, keep=keep)


class Lab:
    """One seed's base and data, made when the first run wants them."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.folder = args.output / f"seed-{seed}"

    @cached_property
    def base(self) -> nn.Module:
        """The pretrained model, from its file if it is there."""
        file = self.folder / "base.safetensors"
        if not file.exists():
            torch.manual_seed(self.seed)
            pretrained = pretrain(load_images(shifted=False)[0], bar=False)
            keep(file, lambda new: save_file(pretrained.state_dict(), new))
        base = small_vit().eval()
        base.load_state_dict(load_file(file))
        return base

    @cached_property
    def data(self) -> tuple[Split, Split]:
        """The training part and the held-out part."""
        return load_images(shifted=True)

    def results(self, run: Run) -> dict[str, Any]:
        """Those of one run, from its file if it is there."""
        file = run.file(self.folder)
        if not file.exists():
            text = json.dumps(self._train(run), indent=1)
            keep_text(file, text)
        found: dict[str, Any] = json.loads(file.read_text())
        if found["settings"] != settings(self.args):
            raise SystemExit(
                f"{file} is of a run with {found['settings']}, and {settings(self.args)} was "
                "asked: pass another --output."
            )
        return found

    def _train(self, run: Run) -> dict[str, Any]:
        options = argparse.Namespace(**vars(self.args))
        gated = run.row == GATED
        first = gated or run.row == ALL
        more: dict[str, Any] = {} if first else {"targets": selected(run, self.folder)}
        if run.row == "half_rank":
            options.rank = max(1, round(self.args.rank * run.percent / 100))
        base, (data, held_out) = self.base, self.data
        torch.manual_seed(self.seed)
        model = adapt(base, data, options, gated, bar=False, **more)
        results = {
            "settings": settings(self.args),
            "score": accuracy(model, held_out),
            "modules": list(tokengate.layers(model)),
            "parameters": sum(
                p.numel()
                for m in tokengate.layers(model).values()
                for p in m.modification.parameters()
            ),
        }
        # On the training part: a selection must not know what it is judged by.
        if gated:
            with tokengate.record(model) as rec:
                accuracy(model, data)
            results["sparsity"] = rec.report().by_module
        elif run.row == ALL:
            norms = tokengate.modification_norms(model, data[0].split(250))
            results["norms"] = {"relative": norms.relative, "absolute": norms.absolute}
            parts = list(zip(data[0].split(64), data[1].split(64), strict=True))
            results["fisher"] = tokengate.fisher_scores(model, parts, loss)
        return results


def loss(model: nn.Module, batch: Split) -> Tensor:
    """Of images (N, 1, H, W) and labels (N,)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for all runs in a folder."""
    return {name: getattr(args, name) for name in ("method", "rank", "penalty", "s", "epochs")}


def table(args: argparse.Namespace, scores: dict[Run, list[float]]) -> str:
    """Table 4 as Markdown; of random, the draws of a seed count as their mean."""
    draws = [scores[run] for run in scores if run.row == "random"]
    rows = [(f"{run.row}_{run.percent}%", scores[run]) for run in planned(args)[2:8]]
    rows.insert(
        5, (f"random_{args.percent}%", [statistics.fmean(one) for one in zip(*draws, strict=True)])
    )
    rows += [(row, scores[Run(row)]) for row in (ALL, GATED)]
    lines = [
        "| | " + " | ".join(f"seed {s}" for s in args.seeds) + " | mean (std) | - all modules |"
    ]
    lines.append("|:--|" + "--:|" * (len(args.seeds) + 2))
    for label, each in rows:
        less = [score - other for score, other in zip(each, scores[Run(ALL)], strict=True)]
        cells = [*(f"{score:.1f}" for score in each), spread(each, ".1f"), spread(less, ".1f")]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(args: argparse.Namespace, scores: dict[Run, list[float]], path: Path) -> None:
    """Figure 8: the score over the share of modules; beside it the other rows of Table 4."""
    figure, axes = plt.subplots(figsize=(8.2, 3.8), layout="constrained")
    swept = sorted({args.percent, *args.sweep} - {100})
    found = [scores[Run(LOW, percent)] for percent in swept] + [scores[Run(ALL)]]
    bars(axes, [*swept, 100], found, "lowest sparsity first", fmt="o-")
    others = [run for run in scores if run.row not in (LOW, ALL, GATED, "random")]
    shift = 1.6  # so that all bars are seen
    for place, run in enumerate(others, 1):
        bars(axes, [run.percent + shift * place], [scores[run]], SPOKEN[run.row], fmt="s")
    drawn = [score for run in scores if run.row == "random" for score in scores[run]]
    bars(axes, [args.percent - shift], [drawn], f"random, {args.draws} draws", fmt="d")
    axes.set(xlabel="modules adapted (%)", ylabel="accuracy, held out (%)", xlim=(0, 104))
    axes.set_ylim(None, 100)
    axes.set_title("Which modules to adapt: mean and deviation over the seeds", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside center right", fontsize=8)  # beside the bars, on none
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(axes: Any, x: list[float], scores: list[list[float]], label: str, fmt: str) -> None:
    """Means, with a standard deviation up and down."""
    means, deviations = zip(*map(middle, scores), strict=True)
    axes.errorbar(x, means, deviations, fmt=fmt, capsize=3, label=label)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="dora", help="a registered method (default: dora)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the method (default: 8)")
    parser.add_argument(
        "--lambda", dest="penalty", type=float, default=1e-5, help="pull to close (default: 1e-5)"
    )
    parser.add_argument("--s", type=float, default=4e-3, help="step size of tau (default: 4e-3)")
    parser.add_argument("--epochs", type=int, default=10, help="of each run (default: 10)")
    parser.add_argument("--percent", type=int, default=50, help="of Table 4 (default: 50)")
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="*",
        default=[10, 20, 30, 40, 50, 60, 70, 80, 90, 100],
        help="percentages of Figure 8 (default: 10 20 ... 100)",
    )
    parser.add_argument("--draws", type=int, default=3, help="of random (default: 3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--output", type=Path, default=Path("outputs/importance_selection"))
    parser.add_argument("--smoke", action="store_true", help="one seed, one epoch: does it run?")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.epochs, args.draws, args.sweep = [0], 1, 1, [50]
    if not all(0 < percent <= 100 for percent in (args.percent, *args.sweep)) or args.draws < 1:
        parser.error("percentages are in (0, 100], and there is at least one draw of random")
    return args


def main() -> None:
    """Run what is missing, then write and print the results."""
    args = parse_arguments()
    runs = planned(args)
    scores: dict[Run, list[float]] = {run: [] for run in runs}
    lines = []
    with tqdm(total=len(runs) * len(args.seeds), unit="run") as progress:
        for seed in args.seeds:
            lab = Lab(args, seed)
            for run in runs:
                progress.set_description(f"seed {seed}, {run.row} {run.percent} %")
                found = lab.results(run)
                scores[run].append(found["score"])
                kept = " ".join(found["modules"])
                numbers = [found["score"], found["parameters"], len(found["modules"])]
                lines.append([seed, run.row, run.percent, run.draw, *numbers, kept])
                progress.update()
    with (args.output / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["seed", "row", "percent", "draw", "score", "parameters", "count", "modules"]
        )
        writer.writerows(lines)
    text = table(args, scores)
    (args.output / "table.md").write_text(text)
    draw(args, scores, args.output / "selection.png")
    print(f"\n{text}\nresults.csv, table.md and selection.png are in {args.output}")


if __name__ == "__main__":
    main()
