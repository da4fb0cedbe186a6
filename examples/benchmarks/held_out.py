"""How near a schedule comes to its target: of trainings drawn by chance, what they close held out.

    python examples/benchmarks/held_out.py
    python examples/benchmarks/held_out.py --kinds pictures --trainings 36 --asked 60 200
    python examples/benchmarks/held_out.py --followed

A training teaches a small network another one's outputs. Held out are positions that it has not
seen; told of is what an `UnreachedSparsityWarning` said in the end. With `--followed` the last
thresholds are those that the schedule followed; otherwise it sets them by the trained model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import tokengate
from tokengate.errors import UnreachedSparsityWarning

# By kind of data: what they are called in the table.
KINDS = {
    "apart": "positions drawn by themselves",
    "alike": "those of a sample share half of their variance",
    "pictures": "pictures of 144 positions, the last layer one for each",
}
NEAR = 0.03
Draw = Callable[[int], Tensor]


def case(kind: str, asked: list[int], seed: int, settle: bool = True) -> dict[str, Any]:
    """What the training of this number is."""
    draw = random.Random(f"{kind} {seed}")
    low, high = asked
    pictures = kind == "pictures"  # of convolutions, which take no adapters
    return {
        "kind": kind,
        "seed": seed,
        "target": round(draw.uniform(0.15, 0.9), 2),
        "steps": round(low * (high / low) ** draw.random()),
        "samples": draw.choice([2, 4, 8, 16, 32]),
        "length": draw.choice([15, 30, 60]),
        "method": draw.choice(["lora", "dora", "adalora", "adapter"][: 3 if pictures else None]),
        "rank": draw.choice([1, 2, 4, 8, 16]),
        "gate": draw.choice(["threshold", "firm", "fisher"]),
        "hidden": draw.choice([1, 2, 3]),
        "noise": draw.choice([0.0, 1.0, 3.0]),
        "lr": draw.choice([1e-3, 3e-3, 1e-2]),
        "decays": draw.choice([False, True]),
        "dropout": draw.choice([0.0, 0.1]),
        "per_layer": not pictures and draw.choice([False, True]),
        "settle": settle,
    }


def network_of(kind: str, hidden: int) -> nn.Module:
    """Linear layers, or convolutions and a linear layer on what they are on average."""
    if kind != "pictures":
        return network(hidden)
    convolutions = [nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(hidden + 1)]
    parts = [part for each in convolutions for part in (each, nn.ReLU())]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def network(hidden: int) -> nn.Sequential:
    """12 inputs, so many hidden layers of width 24, and 5 outputs."""
    widths = pairwise([12, *[24] * hidden])
    parts = [part for k, d in widths for part in (nn.Linear(k, d), nn.Tanh())]
    return nn.Sequential(*parts, nn.Linear(24, 5))


def taught(
    make: Callable[[], nn.Module], draw: Callable[[int], Tensor], generator: torch.Generator,
    target: float, steps: int, *, samples: int, noise: float, lr: float, decays: bool,
    method: str, rank: int, gate: str, dropout: float, **options: Any,
) -> nn.Module:  # fmt: skip
    """One that `make` makes, all of whose layers were adapted in so many steps.

    Args:
        make: called twice; the second one is changed and teaches the first.
        draw: the inputs of so many samples.
        generator: of the teacher's change and of the noise on what it says.
        target: of the schedule, which has the `options`, too.
        decays: whether the learning rate does.
        method: as in `patch`; so are `rank`, `gate` and `dropout`.
    """
    model, teacher = make(), make().requires_grad_(False)
    for p, own in zip(teacher.parameters(), model.parameters(), strict=True):
        p.copy_(own.detach() * (1 + 0.5 * torch.randn(own.shape, generator=generator)))
    targets = [name for name, part in model.named_modules() if hasattr(part, "weight")]
    tokengate.patch(model, targets, method, rank=rank, gate=gate, dropout=dropout)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=lr))
    tokengate.SparsitySchedule(model, optimizer, target, steps, **options)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)) if decays else 1.0
    )
    for _ in range(steps):
        x = draw(samples)
        y = teacher(x)
        y = y + noise * torch.randn(y.shape, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        if method == "adalora":
            loss = loss + 0.1 * tokengate.orthogonality(model)
        loss.backward()
        optimizer.step()
        rate.step()
    return model


def share_closed(model: nn.Module, x: Tensor) -> float:
    """The share of the positions of x that its gates close."""
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model(x)
    return rec.report().sparsity


def inputs(kind: str, length: int, generator: torch.Generator) -> Draw:
    """So many samples' inputs."""

    def draw(samples: int) -> Tensor:
        if kind == "pictures":
            return torch.randn(samples, 3, 12, 12, generator=generator)
        x = torch.randn(samples, length, 12, generator=generator)
        if kind == "alike":
            x = (x + torch.randn(samples, 1, 12, generator=generator)) * 0.5**0.5
        return x

    return draw


def held_out(
    kind: str, seed: int, target: float, steps: int, length: int, hidden: int, **options: Any
) -> dict[str, Any]:
    """The share that is closed of some 20,000 positions, and whether a miss was told of."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    make, draw = partial(network_of, kind, hidden), inputs(kind, length, generator)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = taught(make, draw, generator, target, steps, **options)
    is_told = any(issubclass(each.category, UnreachedSparsityWarning) for each in told)
    size = 1200 if kind == "pictures" else 20_000 // length
    found = share_closed(model, draw(size))
    return {"closed": found, "off": found - target, "told": is_told}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, a row for each kind."""
    lines = [
        f"| | within {NEAR} of the target, told of all the same | others, told of | median miss | "
        "worst not told of |",
        "|:--|--:|--:|--:|--:|",
    ]
    for kind in dict.fromkeys(each["kind"] for each in found):
        own = [each for each in found if each["kind"] == kind]
        misses = [abs(each["off"]) for each in own]
        far = [each for each in own if abs(each["off"]) > NEAR]
        silent = [abs(each["off"]) for each in own if not each["told"]]
        told = sum(each["told"] for each in far)
        lines.append(
            f"| {KINDS[kind]} | {len(own) - len(far)} of {len(own)}, "
            f"{sum(each['told'] for each in own) - told} | {len(far)}, {told} | "
            f"{median(misses):.3f} | {max(silent, default=math.nan):.3f} |"
        )
    return "\n".join(lines)


def draw_picture(found: list[dict[str, Any]], path: Path) -> None:
    """What was closed over what was asked for."""
    import matplotlib  # here, so that who wants the trainings alone needs no more than the library
    from matplotlib import pyplot as plt

    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.axline((0, 0), slope=1, color="0.7", linewidth=1)
    for kind in dict.fromkeys(each["kind"] for each in found):
        own = [each for each in found if each["kind"] == kind]
        at = [each["target"] for each in own], [each["closed"] for each in own]
        axes.scatter(*at, s=12, label=KINDS[kind])
    axes.set(xlabel="target", ylabel="closed, held out", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train what was not trained yet; tell of all that was asked for."""
    from tqdm.auto import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--trainings", type=int, default=75, help="of each kind")
    parser.add_argument("--asked", type=int, nargs=2, default=(20, 700), help="steps, from and to")
    parser.add_argument("--followed", action="store_true", help="do not settle in the end")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/held_out"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    cases = [case(kind, options.asked, seed, not options.followed) for kind in options.kinds
             for seed in range(options.trainings)]  # fmt: skip
    known = [{name: each[name] for name in cases[0]} for each in found]
    found = [each for each, own in zip(found, known, strict=True) if own in cases]
    for each in tqdm([each for each in cases if each not in known], unit="training"):
        found.append({**each, **held_out(**each)})
        with path.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")
    print(table(found))
    draw_picture(found, options.out / "figure.png")
    print(f"\n{options.out}: results.jsonl, figure.png")


if __name__ == "__main__":
    main()
