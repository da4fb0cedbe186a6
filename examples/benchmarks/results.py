"""What was measured: a table to read, a file for programs, and a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rounds import Measurements
from variants import BASE, PEFT, THRESHOLD, UNGATED

matplotlib.use("Agg")

# By the name of a case, of a variant: all its measurements.
Found = dict[str, Measurements]


def report(
    found: Found,
    unit: str,
    options: argparse.Namespace,
    figure: Figure | None = None,
    **more: Any,
) -> None:
    """Print the table; write results.json and figure.png, of bars unless it is given."""
    options.out.mkdir(parents=True, exist_ok=True)
    print(table(found, unit))
    text = json.dumps({**about(options), "unit": unit, "results": found, **more}, indent=1)
    (options.out / "results.json").write_text(text)
    figure = figure or bars(found, unit)
    figure.savefig(options.out / "figure.png", dpi=150)
    plt.close(figure)
    print(f"\n{options.out}: results.json, figure.png")


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, and what it ran on."""
    return {
        "script": Path(sys.argv[0]).name,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "machine": f"{os.cpu_count()} cores {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name(options.device)
        if options.device.startswith("cuda")
        else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def table(found: Found, unit: str) -> str:
    """Markdown: medians with quartiles, and ratios of medians."""
    measured = next(iter(found.values()))
    others = [name for name in (PEFT, UNGATED, BASE, THRESHOLD) if name in measured]
    head = ["case", "variant", f"{unit} (quartiles)", *(f"/ {name}" for name in others)]
    lines = [head, [":--", ":--", "--:", *["--:"] * len(others)]]
    for case, variants in found.items():
        medians = {name: float(np.median(values)) for name, values in variants.items()}
        for name, values in variants.items():
            low, high = np.percentile(values, [25, 75])
            lines.append(
                [
                    case,
                    name,
                    f"{medians[name]:.1f} ({low:.1f} to {high:.1f})",
                    *(f"{medians[name] / medians[other]:.2f}" for other in others),
                ]
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def bars(found: Found, unit: str) -> Figure:
    """A group of bars for each case, whose marks are quartiles."""
    variants = list(dict.fromkeys(name for each in found.values() for name in each))
    figure, axes = plt.subplots(figsize=(2 + 1.5 * len(found), 4), layout="constrained")
    for i, name in enumerate(variants):
        at = [j for j, each in enumerate(found.values()) if name in each]
        quartiles = [
            np.percentile(each[name], [25, 50, 75]) for each in found.values() if name in each
        ]
        low, middle, high = np.array(quartiles).T
        place = np.array(at) + (i - (len(variants) - 1) / 2) * 0.8 / len(variants)
        axes.bar(place, middle, 0.8 / len(variants), yerr=[middle - low, high - middle], label=name)
    axes.set_xticks(range(len(found)), [case.replace(", ", "\n") for case in found])
    axes.set_ylabel(f"{unit}, median and quartiles")
    axes.set_ylim(0, None)
    axes.set_title("Less is better")
    axes.legend(fontsize="small")
    return figure
