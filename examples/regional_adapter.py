"""Two adapters, two regions of one picture, in one forward.

A small transformer learns to redraw handwritten digits from noisy ones, patch by patch. One
adapter teaches it to draw them black on white, another to draw outlines only. With `tokengate.use`
each acts at its own patches of one picture, and the rest stays the base's. Nothing is downloaded;
two cores need two minutes.

    python examples/regional_adapter.py --output outputs/regional_adapter
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from custom_method import Block
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import tokengate

SIDE, PATCH = 32, 4  # of a picture and of a patch, in pixels
GRID = SIDE // PATCH


class Painter(nn.Module):
    """Pictures to pictures, (B, 32, 32) -> (B, 32, 32), as 64 patches that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(PATCH**2, 64), nn.Linear(64, PATCH**2)
        self.place = nn.Parameter(0.1 * torch.randn(GRID**2, 64))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, pictures: Tensor) -> Tensor:
        patches = pictures.reshape(-1, GRID, PATCH, GRID, PATCH).transpose(2, 3)
        x = self.embed(patches.reshape(-1, GRID**2, PATCH**2)) + self.place
        for block in self.blocks:
            x = block(x)
        patches = self.out(x).reshape(-1, GRID, GRID, PATCH, PATCH).transpose(2, 3)
        return patches.reshape(-1, SIDE, SIDE)


def pictures() -> Tensor:
    """Four digits on each, (N, 32, 32)."""
    digits = F.interpolate(torch.tensor(load_digits().images)[:, None].float() / 16, size=SIDE // 2)
    digits = digits[: len(digits) // 4 * 4, 0].reshape(4, -1, SIDE // 2, SIDE // 2)
    return torch.cat([torch.cat([*digits[:2]], 2), torch.cat([*digits[2:]], 2)], 1)


def outlines(drawn: Tensor) -> Tensor:
    """Where a picture changes from one pixel to the next."""
    lightest = F.max_pool2d(drawn[:, None], 3, 1, 1)[:, 0]
    return lightest - drawn


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "black on white": lambda drawn: 1 - drawn,
    "outlines": outlines,
}


def train(
    model: nn.Module,
    groups: list[dict],
    style: Callable[[Tensor], Tensor],
    data: Tensor,
    name: str,
    steps: int,
) -> None:
    """Towards a style of each noisy picture."""
    optimizer = torch.optim.AdamW(groups)
    for _ in trange(steps, desc=name):
        batch = data[torch.randint(len(data), (32,))]
        optimizer.zero_grad()
        noisy = batch + 0.2 * torch.randn_like(batch)
        F.mse_loss(model(noisy), style(batch)).backward()
        optimizer.step()


def main() -> None:
    """Train the base and both adapters, paint with both at once, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--steps", type=int, default=500, help="of each training")
    parser.add_argument("--output", type=Path, default=Path("outputs/regional_adapter"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    data = pictures()
    base = Painter()
    groups = [{"params": list(base.parameters()), "lr": 2e-3}]
    train(base, groups, lambda drawn: drawn, data, "the base", arguments.steps)
    for name, style in STYLES.items():
        model = tokengate.patch(copy.deepcopy(base), "all-linear", rank=8, gate=False)
        train(model, tokengate.param_groups(model, lr=1e-2), style, data, name, arguments.steps)
        tokengate.save(model, arguments.output / name)

    model = base.eval()
    for name in STYLES:
        tokengate.load(model, arguments.output / name, name=name)
    shown = data[:4] + 0.2 * torch.randn(4, SIDE, SIDE)
    # Rows of 64 patches, from the upper left on: a disc on the left, a band on the right.
    y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    disc = ((y - 3.5) ** 2 + (x - 1.5) ** 2 < 6).reshape(1, -1).expand(4, -1)
    band = (x >= 5).reshape(1, -1).expand(4, -1)
    rows = {"given": shown}
    with torch.no_grad():
        with tokengate.disabled(model):
            rows["the base"] = model(shown)
        for name in STYLES:
            with tokengate.use(model, name):
                rows[name] = model(shown)
        with tokengate.use(model, dict(zip(STYLES, (disc, band), strict=True))):
            rows["both, each at\nits own patches"] = model(shown)
    figure = Figure(figsize=(6.4, 7.9), layout="constrained")
    figure.suptitle("Two adapters in one forward, each in a region of its own")
    axes = figure.subplots(len(rows), 4)
    # By pixels, with nothing around them, so that an outline is closed and runs along the patches.
    region = torch.stack([disc[0], band[0]]).float().reshape(2, 1, GRID, GRID)
    region = F.pad(F.interpolate(region, size=SIDE), (1, 1, 1, 1))[:, 0]
    at = torch.arange(-1, SIDE + 1).numpy()
    for (name, row), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, picture in zip(line, row, strict=True):
            ax.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
            if name.startswith("both"):
                for each, colour in zip(region.numpy(), ("tab:orange", "tab:cyan"), strict=True):
                    ax.contour(at, at, each, levels=[0.5], colors=colour, linewidths=2)
            ax.set(xticks=[], yticks=[])
    lines = [Line2D([], [], color=colour) for colour in ("tab:orange", "tab:cyan")]
    names = [f"where {name!r} is in use" for name in STYLES]
    figure.legend(lines, names, loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(arguments.output / "regions.png", dpi=110)
    print(f"{arguments.output / 'regions.png'}: two adapters, two regions, one forward")


if __name__ == "__main__":
    main()
