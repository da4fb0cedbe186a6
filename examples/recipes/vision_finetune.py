"""A vision transformer of timm on pictures, with every method, gated or not.

A model of timm with its pretrained weights, on a folder of class folders, FLOWERS/train/ROSE/1.jpg
and FLOWERS/test/ROSE/2.jpg:

    python examples/recipes/vision_finetune.py --model vit_small_patch16_224 --data . --task FLOWERS

Without `--model` nothing is downloaded: a small ViT is first trained on one data set, once for all
runs of an output folder, and then adapted to another.

    python examples/recipes/vision_finetune.py --data DATA --pretrain-on cifar10-jpg \\
        --task fashion-mnist

What `recipe.py` says of recipes holds here, and `vision_data.py` of data. Beside a gated run's
results.json is patches.png: some held-out pictures, and which of their patches were modified. With
`--frozen` the head alone is trained, which is what the methods have to beat.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import recipe
import timm
import torch
import vision_data
from forgetting import drifts
from matplotlib.figure import Figure
from recipe_results import keep
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed
from vision_data import Pictures

import tokengate
from tokengate.integrations.vision import ROLES, patch_grid, roles


class Classifier(nn.Module):
    """A backbone, as the Trainer wants it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Pictures (N, C, H, W) and classes (N,) to the loss and logits (N, classes)."""
        logits = self.backbone(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def parts(
    run: argparse.Namespace, name: str, model: nn.Module, validation: bool, rows: int | None
) -> tuple[Pictures, Pictures, list[str]]:
    """A data set's two parts as the model wants them, without augmentation, and its classes."""
    train, held_out, classes = vision_data.load(name, run.data, validation, rows)
    options = {"img_size": run.pixels, "crop_pct": 1.0}  # to the edge
    transform = create_transform(**resolve_data_config(options, model=model))
    held_out = held_out[:32] if run.smoke else held_out
    return Pictures(train, transform), Pictures(held_out, transform), classes


def pretrained(run: argparse.Namespace) -> tuple[nn.Module, float | None]:
    """The backbone, and where the recipe trained it, its accuracy on its own data set."""
    if run.model:
        size = {"img_size": run.pixels} if run.pixels else {}
        return timm.create_model(run.model, pretrained=True, **size), None
    set_seed(0)  # one backbone for all seeds, which are of the adaptation alone
    width, depth = (32, 2) if run.smoke else (64, 6)
    vit = timm.models.VisionTransformer(
        img_size=run.pixels, patch_size=4, embed_dim=width, depth=depth, num_heads=width // 32,
        mlp_ratio=2, num_classes=0,
    )  # fmt: skip
    rows = run.rows if run.smoke else None
    # Where both are of one data set, what settings are chosen on must be new to the ViT, too.
    apart = run.validation and run.task == run.pretrain_on
    train, held_out, classes = parts(run, run.pretrain_on, vit, apart, rows)
    vit.reset_classifier(len(classes))
    name = f"{run.pretrain_on}-{run.pixels}-{run.pretrain_epochs:g}"
    file = run.output / "pretrained" / f"{name}{'-apart' * apart}{'-smoke' * run.smoke}.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        vit.load_state_dict(saved["weights"])
        return vit, saved["accuracy"]
    trainer = Trainer(
        Classifier(vit),
        TrainingArguments(
            str(file.parent), num_train_epochs=run.pretrain_epochs, learning_rate=2e-3,
            warmup_steps=100, per_device_train_batch_size=64 // recipe.WORLD, weight_decay=0.01,
            per_device_eval_batch_size=256, save_strategy="no", report_to="none",
            dataloader_num_workers=run.workers, **recipe.HARDWARE,
        ),
        train_dataset=train,
        data_collator=default_data_collator,
    )  # fmt: skip
    trainer.train()
    right = accuracy(trainer, held_out)
    if recipe.FIRST:
        print(f"the ViT is right on {right:.1f} % of what {run.pretrain_on} holds out")
        saved = {"weights": vit.state_dict(), "accuracy": right}
        keep(file, lambda new: torch.save(saved, new))
    return vit, right


def accuracy(trainer: Trainer, data: Pictures) -> float:
    """Share of pictures that are classified correctly, in percent."""
    answers = recipe.predict(trainer, data, default_data_collator).argmax(-1)
    return 100 * statistics.fmean(
        a == label for a, (_, label) in zip(answers.tolist(), data.rows, strict=True)
    )


def draw(model: Classifier, data: Pictures, classes: list[str], path: Path) -> None:
    """Eight pictures; below, over each, the share of layers that modified each of its patches."""
    shown = [data[i] for i in range(min(8, len(data)))]
    place = next(model.parameters()).device
    batch = {name: value.to(place) for name, value in default_data_collator(shown).items()}
    with tokengate.record(model, positions=True) as rec, torch.no_grad():
        model.eval()(**batch)
    size = batch["pixel_values"].shape[-2:]
    grids = [
        patch_grid(model.backbone, calls[0], name.removeprefix("backbone."))
        for name, calls in rec.positions.items()
    ]
    # In pixels, because the stages of a Swin have grids of different sizes.
    layers = [F.interpolate(grid.unsqueeze(1).float(), size).squeeze(1) for grid in grids]
    shares = torch.stack(layers).mean(0).cpu().numpy()
    figure = Figure(figsize=(12, 3.7), layout="constrained")
    figure.suptitle(
        "Pictures, and which of their patches were modified; in the others it is the base"
    )
    axes = figure.subplots(2, len(shown), squeeze=False)
    for (above, below), row, share in zip(axes.T, shown, shares, strict=True):
        picture = row["pixel_values"].movedim(0, -1).numpy()
        picture = (picture - picture.min()) / max(np.ptp(picture), 1e-6)
        above.imshow(picture)
        above.set_title(classes[row["labels"]], fontsize=9)
        below.imshow(picture.mean(-1), cmap="gray")
        patches = below.imshow(share, cmap="viridis", vmin=0, vmax=1, alpha=0.7)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    axes[0, 0].set_ylabel("what it saw")
    axes[1, 0].set_ylabel("its patches")
    bar = figure.colorbar(patches, ax=axes, aspect=14, label="share of layers that modified it")
    bar.set_ticks([0, 0.5, 1], labels=["none", "half", "all"])
    figure.savefig(path, dpi=130)


def perform(run: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once."""
    backbone, before = pretrained(run)
    set_seed(run.seed)  # whether the backbone was trained in this run or read
    name = "digits" if run.smoke and not run.data else run.task
    train, held_out, classes = parts(run, name, backbone, run.validation, run.rows)
    backbone.reset_classifier(len(classes))
    model = Classifier(backbone)
    head = [n for n, module in model.named_modules() if module is backbone.get_classifier()]
    recipe.patch(model, roles(model, *ROLES), run, train=head)
    if run.frozen:
        for layer in tokengate.layers(model).values():
            layer.modification.requires_grad_(False)
    trainer = recipe.fit(
        model, run, train, default_data_collator, per_device_eval_batch_size=256,
        dataloader_num_workers=run.workers,
    )  # fmt: skip
    with tokengate.record(model) as rec:
        right = accuracy(trainer, held_out)
    report = rec.report(reduce=True)
    shown = [held_out[i] for i in range(min(512, len(held_out)))]
    if recipe.FIRST and run.gate != "off":
        try:
            draw(model, held_out, vision_data.spoken(name, classes), run.folder / "patches.png")
        except tokengate.TokenGateError as why:
            print(f"no patches.png: {why}")
    return {
        "scores": {name: right},
        "sparsity": {name: 100 * report.sparsity},
        **drifts(name, model, [default_data_collator(shown)]),
        "pretrained": before,
        "report": report.to_dict(),
        "log": trainer.state.log_history,
    }


def preset(run: argparse.Namespace) -> dict[str, Any]:
    """What the small ViT and `--smoke` choose."""
    small = {"rows": 64, "epochs": 2, "rank": 2, "pretrain_epochs": 2, "pretrain_on": "digits"}
    return ({} if run.model else {"pixels": 28}) | (small if run.smoke else {})


def main() -> None:
    """Every task with every method."""
    options = recipe.options(__doc__, axes=("task", "method", "gate", "seed"))
    add = options.add_argument
    add("--task", nargs="+", default=["digits"], help="data sets: names of folders in --data")
    add("--data", type=Path, help="folder of the data sets' folders")
    add("--validation", action="store_true", help="hold out a tenth of the training part instead")
    add("--pixels", type=int, help="height and width; by default the model's, 28 for the small ViT")
    add("--model", help="a name of timm, instead of the small ViT")
    add("--pretrain-on", default="cifar10-jpg", help="the small ViT's data set")
    add("--pretrain-epochs", type=float, default=2)
    add("--frozen", action="store_true", help="train the new head alone")
    add("--workers", type=int, default=0, help="processes that read pictures")
    recipe.main(recipe.planned(options, preset), perform)


if __name__ == "__main__":
    main()
