"""How a gated training step's cost, relative to the frozen base's, grows with the sizes.

One size at a time is changed, of one method, dtype and dropout. A slope is that of a straight line
through the logarithms: at 0 the size does not matter, at 1 the relative cost is proportional to it.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --methods dora --ranks 8 32 128
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from results import report
from rounds import Measurements, timed
from settings import Setting, parser, settings
from variants import BASE, GATED, UNGATED, models, sparsity, tokens, trainings

AXES = {
    "batches": [1, 2, 4, 8],
    "ranks": [8, 16, 32, 64],
    "widths": [256, 512, 1024, 2048],
    "layers": [1, 2, 4, 8],
}
SPOKEN = {
    "batches": "samples of a batch",
    "ranks": "rank",
    "widths": "width of the model",
    "layers": "layers of the model",
}


def resized(setting: Setting, axis: str, size: int) -> Setting:
    """`setting` with another size on that axis."""
    if axis == "batches":
        return replace(setting, batch=size)
    if axis == "ranks":
        return replace(setting, rank=size)
    shape = {"num_hidden_layers": size}
    if axis == "widths":
        shape = {"hidden_size": size, "intermediate_size": size * 11 // 4}
    return replace(setting, shape=setting.shape | shape)


def measure(
    setting: Setting, title: str, options: argparse.Namespace
) -> tuple[Measurements, float]:
    """Times of the base's, the ungated and the gated step; and the share of closed gates."""
    variants = models(setting)
    steps = {name: t.step for name, t in trainings(variants, setting).items()}
    times = timed({name: steps[name] for name in (BASE, UNGATED, GATED)}, options, title)
    return times, sparsity(variants[GATED], tokens(setting))


def draw(panel: Axes, axis: str, sizes: list[int], cases: list[Measurements]) -> dict[str, float]:
    """A line for each variant over the base's; their slopes."""
    slopes = {}
    for name in (UNGATED, GATED):
        times = [np.median(each[name]) / np.median(each[BASE]) for each in cases]
        slopes[name] = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
        panel.plot(sizes, times, "o-", label=f"{name}, slope {slopes[name]:.2f}")
    panel.set(xscale="log", xlabel=SPOKEN[axis], xticks=sizes, xticklabels=sizes)
    panel.minorticks_off()
    panel.legend(fontsize="small")
    return slopes


def main() -> None:
    """Time every size; print slopes and draw a panel for every axis."""
    options = parser(__doc__.splitlines()[0], "scaling")
    options.set_defaults(
        methods=["lora"],
        dtypes=["float32"],
        config=[("hidden_size", 512), ("intermediate_size", 1408), ("num_hidden_layers", 2)],
    )
    for axis, sizes in AXES.items():
        options.add_argument(f"--{axis}", type=int, nargs="+", default=sizes)
    options = options.parse_args()
    [setting] = settings(options)
    found, closed, slopes = {}, {}, {}
    figure, panels = plt.subplots(1, len(AXES), figsize=(16, 4), sharey=True, layout="constrained")
    for axis, panel in zip(AXES, panels, strict=True):
        sizes = getattr(options, axis)
        cases = [f"{axis} {size}" for size in sizes]
        for case, size in zip(cases, sizes, strict=True):
            found[case], closed[case] = measure(resized(setting, axis, size), case, options)
        slopes[axis] = draw(panel, axis, sizes, [found[case] for case in cases])
    panels[0].set_ylabel("times the frozen base's step")
    panels[0].set_ylim(0, None)
    figure.suptitle("What a training step costs, by what grows")
    report(found, "ms", options, figure, sparsity=closed, slopes=slopes)
    for axis, each in slopes.items():
        print(f"{axis}: " + "; ".join(f"{name}, slope {slope:.2f}" for name, slope in each.items()))


if __name__ == "__main__":
    main()
