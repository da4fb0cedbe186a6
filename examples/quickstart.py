"""Patch a small vision transformer, train it, and see which patches were modified.

A ViT is pretrained on scikit-learn's handwritten digits (real scans), white on black. It is then
adapted to the same digits in black on a bright and cluttered ground, in three ways: frozen with a
new head, with the method on every position, and with the method gated. Nothing is downloaded; two
cores need under two minutes.

    python examples/quickstart.py --output outputs/quickstart
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import tokengate

CANVAS, PATCH = 24, 4
GRID = CANVAS // PATCH
LEARNING_RATE = 1e-2  # of the modifications and the new head
TARGETS = ["attn.qkv", "attn.proj", "fc1", "fc2"]

Split = tuple[Tensor, Tensor]  # images (N, 1, CANVAS, CANVAS) and labels (N,)


def load_images(shifted: bool) -> tuple[Split, Split]:
    """The digits as (training part, held-out part), in the plain or the shifted version."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(CANVAS, CANVAS), mode="bilinear")
    labels = torch.tensor(digits.target)
    if shifted:
        generator = torch.Generator().manual_seed(0)
        clutter = 0.3 * torch.rand(images.shape, generator=generator)
        images = 1 - torch.maximum(images, clutter)
    # The same images are held out of both tasks.
    train, test = train_test_split(range(len(labels)), test_size=500, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])


def train(
    model: nn.Module, groups: list[dict], data: Split, epochs: int, name: str, bar: bool = True
) -> None:
    """AdamW under a linear warm-up and decay, which leaves tau's learning rate constant."""
    images, labels = data
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * (len(labels) // 64)

    def warm_up_and_decay(step: int) -> float:
        return min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))

    schedule = [warm_up_and_decay] + [lambda step: 1.0] * (len(groups) - 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    progress = tqdm(total=steps, desc=f"{name:<20}", disable=not bar)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64)[: steps // epochs]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()


def accuracy(model: nn.Module, data: Split) -> float:
    """Share of images that are classified correctly, in percent."""
    images, labels = data
    predicted = torch.cat([model(part).argmax(-1) for part in images.split(250)])
    return 100 * (predicted == labels).float().mean().item()


def small_vit() -> nn.Module:
    """An untrained ViT for digits."""
    return timm.models.VisionTransformer(
        img_size=CANVAS,
        patch_size=PATCH,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
    )


def pretrain(data: Split, bar: bool = True) -> nn.Module:
    """A small ViT that knows the digits of `data`."""
    base = small_vit()
    train(base, [{"params": list(base.parameters()), "lr": 2e-3}], data, 20, "pretraining", bar)
    return base.eval()


def adapt(
    base: nn.Module,
    data: Split,
    arguments: argparse.Namespace,
    gate: bool,
    targets: Sequence[str] = TARGETS,
    bar: bool = True,
) -> nn.Module:
    """A copy of `base` with a new head and modifications, trained on `data`."""
    model = copy.deepcopy(base)
    model.reset_classifier(10)
    tokengate.patch(
        model,
        targets,
        arguments.method,
        rank=arguments.rank,
        penalty=arguments.penalty,
        gate=gate,
        train=["head"],
    )
    groups = tokengate.param_groups(model, lr=LEARNING_RATE, s=arguments.s)
    name = f"{'gated' if gate else 'ungated'} {arguments.method}"
    train(model, groups, data, arguments.epochs, name, bar)
    return model.eval()


def draw_patches(
    images: Tensor, labels: Tensor, answers: Tensor, positions: dict[str, list[Tensor]], file: Path
) -> None:
    """Above the images, below the share of modules that modified each of their patches."""
    modified = torch.stack([torch.cat(calls) for calls in positions.values()]).float().mean(0)
    patches = modified[:, -GRID * GRID :].reshape(-1, GRID, GRID)  # without the class token
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(
        "Which patches of a digit did the adapted ViT modify? In the others it is its base, exactly"
    )
    axes = figure.subplots(2, len(images))
    # Both rows in pixels, so that the digit's outline lies on the patches below it.
    extent = (0, CANVAS, CANVAS, 0)
    centres = torch.arange(CANVAS) + 0.5
    for column, (image, share) in enumerate(zip(images[:, 0], patches, strict=True)):
        above, below = axes[:, column]
        above.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent)
        above.set_title(f"a {labels[column]}, read as {answers[column]}", fontsize=9)
        shown = below.imshow(share, cmap="viridis", vmin=0, vmax=1, extent=extent)
        below.contour(centres, centres, image, levels=[0.45], colors="white", linewidths=1.2)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    axes[0, 0].set_ylabel("what it saw")
    axes[1, 0].set_ylabel("its patches,\ndigit outlined")
    bar = figure.colorbar(shown, ax=axes, aspect=14, label="share of modules that modified it")
    bar.set_ticks([0, 0.5, 1], labels=["none", "half", "all"])
    figure.savefig(file, dpi=130)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="lora", help="a registered method (default: lora)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the method (default: 8)")
    parser.add_argument(
        "--lambda", dest="penalty", type=float, default=1e-5, help="pull to close (default: 1e-5)"
    )
    parser.add_argument("--s", type=float, default=7e-4, help="step size of tau (default: 7e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--epochs", type=int, default=20, help="of each adaptation (default: 20)")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="a folder")
    return parser.parse_args()


def main() -> None:
    """Pretrain, adapt in three ways, print what came out and draw it."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    source, source_test = load_images(shifted=False)
    target, target_test = load_images(shifted=True)
    base = pretrain(source)
    print(f"pretrained: {accuracy(base, source_test):.1f} % on its own task,")
    print(f"            {accuracy(base, target_test):.1f} % on the shifted one\n")

    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.reset_classifier(10)
    head = [{"params": list(frozen.head.parameters()), "lr": LEARNING_RATE}]
    train(frozen, head, target, arguments.epochs, "frozen, new head")
    ungated = adapt(base, target, arguments, gate=False)
    gated = adapt(base, target, arguments, gate=True)

    with tokengate.record(gated) as rec:
        gated_score = accuracy(gated, target_test)
    report = rec.report()
    scores = {
        "frozen, new head": accuracy(frozen.eval(), target_test),
        f"{arguments.method} on every position": accuracy(ungated, target_test),
        f"{arguments.method}, gated": gated_score,
    }
    print("\naccuracy on the shifted task")
    for name, score in scores.items():
        print(f"  {name:<26} {score:.1f} %")
    print("\ntau")
    for name, module in report.modules.items():
        print(f"  {name:<26} {module.tau:+.4f}")
    print(f"\n{report}")

    arguments.output.mkdir(parents=True, exist_ok=True)
    images, labels = (part[:8] for part in target_test)
    with tokengate.record(gated, positions=True) as rec, torch.no_grad():
        answers = gated(images).argmax(-1)
    report.plot(arguments.output / "sparsity.png")
    draw_patches(images, labels, answers, rec.positions, arguments.output / "patches.png")
    results = {"accuracy": scores, **report.to_dict()}
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2))
    print(f"\nsparsity.png, patches.png and results.json are in {arguments.output}")


if __name__ == "__main__":
    main()
