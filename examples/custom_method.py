"""A method of your own in about fifteen lines: VeRA, gated like the built-in ones.

VeRA (Kopiczko et al., 2024, arXiv 2310.11454) draws a pair of random projections, frozen and shared
by all layers of a shape, and trains two scaling vectors for each layer. (The paper draws them
kaiming-uniform; here they are normal.) It adapts a small transformer, which has learned
handwritten digits row by row, to the same digits on their side. Nothing is downloaded; two cores
need under half a minute.

    python examples/custom_method.py --output outputs/custom_method
"""

from __future__ import annotations

import argparse
import copy
import functools
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import tokengate
from tokengate.kernels import Factors


@functools.cache
def projection(rows: int, columns: int, seed: int) -> Tensor:
    """A frozen random matrix, the same for every layer of its shape."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return drawn / columns**0.5


@tokengate.register("vera")
class VeRA(tokengate.Modification):
    """M(x) = b * (B (d * (A x))), with A and B random and frozen; b = 0 at first."""

    def __init__(self, linear: nn.Linear, *, rank: int = 64, seed: int = 0) -> None:
        super().__init__(linear)
        device = linear.weight.device
        A = projection(rank, self.in_features, seed).to(device)
        B = projection(self.out_features, rank, seed + 1).to(device)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.d = self.new_parameter(rank)
        self.b = self.new_parameter(self.out_features)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.d, 0.1)
        nn.init.zeros_(self.b)

    def factors(self, x: Tensor, w: Tensor, linear: nn.Linear | None) -> Factors:
        z = F.linear(x.to(w.dtype), self.A.to(w.dtype)) * self.d.to(w.dtype)
        return Factors(z, (self.b.unsqueeze(1) * self.B).to(w.dtype))


class Block(nn.Module):
    """One pre-norm transformer block of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(64, 64) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.o_proj(
            F.scaled_dot_product_attention(self.q_proj(y), self.k_proj(y), self.v_proj(y))
        )
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Reader(nn.Module):
    """Reads an image of 8 x 8 pixels as eight tokens, its rows: (B, 8, 8) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.place = nn.Parameter(0.1 * torch.randn(8, 64))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 10)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def load_images() -> tuple[Tensor, Tensor, Tensor]:
    """Digits upright and on their side, (N, 8, 8) each, and what they are, in a random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    upright = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    return upright, upright.rot90(1, (1, 2)), torch.tensor(digits.target)[order]


def train(model: nn.Module, groups: list[dict], images: Tensor, labels: Tensor, name: str) -> None:
    """400 steps of AdamW on random batches of 64."""
    optimizer = torch.optim.AdamW(groups)
    for _ in trange(400, desc=name):
        batch = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified correctly, in percent."""
    return 100 * (model(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Pretrain, patch with VeRA, train it gated, save it, load it elsewhere, take it out again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/custom_method"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    upright, turned, labels = load_images()
    test, rest = slice(0, 500), slice(500, None)

    base = Reader()
    groups = [{"params": list(base.parameters()), "lr": 2e-3}]
    train(base, groups, upright[rest], labels[rest], "upright")
    before = accuracy(base, turned[test], labels[test])

    model = tokengate.patch(copy.deepcopy(base), "all-linear", "vera", train=["head"])
    groups = tokengate.param_groups(model, lr=2e-2, s=1e-3)
    train(model, groups, turned[rest], labels[rest], "on their side")
    with tokengate.record(model) as rec:
        after = accuracy(model, turned[test], labels[test])
    print(f"digits on their side: {before:.1f} % before, {after:.1f} % after\n\n{rec.report()}\n")

    tokengate.save(model, arguments.output)
    size = sum(file.stat().st_size for file in arguments.output.glob("adapter_*")) / 1024
    other = copy.deepcopy(base)
    tokengate.load(other, arguments.output)
    assert torch.equal(other(turned[test]), model(turned[test]))
    print(f"{arguments.output}: {size:.0f} KiB; loaded into a new copy, it is the same")

    # The head was trained itself; all else is as it was.
    tokengate.unpatch(model).head = base.head
    assert torch.equal(model(turned[test]), base(turned[test]))
    print("unpatched and with its old head, the model is what it was")


if __name__ == "__main__":
    main()
