"""The tasks of GLUE: texts from files or the hub, metrics, and the settings of the paper."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from made_up import WORDS
from packed import read_bytes
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

Row = tuple[tuple[str, ...], float]  # one text or a pair of them, and the label
Metric = Callable[[np.ndarray, np.ndarray], float]  # of the truth and the answers


METRICS: dict[str, Metric] = {
    "matthews": lambda truth, answers: matthews_corrcoef(truth, answers),
    "accuracy": lambda truth, answers: (truth == answers).mean(),
    "f1": lambda truth, answers: f1_score(truth, answers),
    "spearman": lambda truth, answers: spearmanr(truth, answers).statistic,
    "pearson": lambda truth, answers: pearsonr(truth, answers).statistic,
}
NO_CONSENSUS = "-"  # MNLI's label of rows that were given different ones


@dataclass(frozen=True)
class Task:
    """One task: where its texts and labels stand, and how it is measured."""

    folder: str
    """As GLUE's authors call it."""
    texts: tuple[str, ...]
    """Columns of the texts, on the hub and, unless `columns` says otherwise, in the files."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names from `METRICS`, the first of which the table has."""
    label: str = "label"
    """The files' column of the label."""
    classes: tuple[str, ...] = ("0", "1")
    """How the files spell the labels 0, 1...; none for a task with a number to be predicted."""
    train: str = "train.tsv"
    held_out: tuple[str, ...] = ("dev.tsv",)
    columns: tuple[str, ...] | None = None
    """Names of the files' columns, where they have no header."""
    renamed: tuple[str, ...] | None = None
    """The files' columns of the texts, where they are not the hub's."""
    validation: str = "validation"
    """The hub's held-out part."""


ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(
        "CoLA",
        ("sentence",),
        ("matthews", "accuracy"),
        train="in_domain_train.tsv",
        held_out=("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst2": Task("SST-2", ("sentence",)),
    "mrpc": Task(
        "MRPC",
        PAIR,
        ("accuracy", "f1"),
        label="Quality",
        train="msr_paraphrase_train.txt",
        held_out=("msr_paraphrase_test.txt",),
        renamed=("#1 String", "#2 String"),
    ),
    "qqp": Task("QQP", ("question1", "question2"), ("accuracy", "f1"), label="is_duplicate"),
    "stsb": Task("STS-B", PAIR, ("spearman", "pearson"), label="score", classes=()),
    "mnli": Task(
        "MNLI",
        ("premise", "hypothesis"),
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        held_out=("dev_matched.tsv",),
        renamed=PAIR,
        validation="validation_matched",
    ),
    "qnli": Task("QNLI", ("question", "sentence"), classes=ENTAILMENT),
    "rte": Task("RTE", PAIR, classes=ENTAILMENT),
}

# Table 8: dropout, learning rate and epochs of each task; the rest is the same for all.
TABLE_8 = {
    "cola": (0.1, 4e-4, 40),
    "mnli": (0.15, 2.5e-4, 10),
    "qnli": (0.1, 2e-4, 10),
    "rte": (0.2, 1e-4, 80),
    "mrpc": (0.0, 1e-4, 60),
    "qqp": (0.15, 4e-4, 10),
    "sst2": (0.0, 4e-4, 48),
    "stsb": (0.2, 5e-4, 45),
}
# Table 3: lambda of each task. DoRA is not in it and takes LoRA's.
ORDER = ("mnli", "cola", "qnli", "rte", "mrpc", "qqp", "sst2", "stsb")
TABLE_3 = {
    "lora": dict(zip(ORDER, (1e-5, 6e-6, 2e-5, 1e-5, 1e-5, 2e-6, 2e-5, 8e-5), strict=True)),
    "adalora": dict(zip(ORDER, (9e-6, 5e-6, 4.5e-7, 2e-6, 2e-8, 5e-7, 2e-6, 5e-6), strict=True)),
    "adapter": dict(zip(ORDER, (5e-7, 4.5e-7, 4.5e-7, 2e-6, 2e-8, 5e-7, 2e-6, 5e-6), strict=True)),
}
TABLE_3["dora"] = TABLE_3["lora"]


def paper(task: str, method: str) -> dict[str, object]:
    """The arguments of finetune_glue.py that the paper's Tables 3 and 8 give."""
    dropout, lr, epochs = TABLE_8[task]
    return {
        "model": "microsoft/deberta-v3-base",
        "rank": 32 if method == "adapter" else 4,
        "scale": 0.5,
        "dropout": dropout,
        "lr": lr,
        "batch_size": 32,
        "epochs": epochs,
        "s": 1e-4,
        "penalty": TABLE_3[method][task],
    }


def score(name: str, truth: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """The task's metrics."""
    return {metric: float(METRICS[metric](truth, answers)) for metric in TASKS[name].metrics}


def read(path: Path, task: Task) -> list[Row]:
    """The rows of one tab-separated file, also compressed with xz.

    Without those that its authors could not agree on, and the few of QQP that are cut off.
    """
    # Not a csv dialect's quotes: these files have single ones within a text.
    text = io.StringIO(read_bytes(path).decode("utf-8-sig"))
    lines = list(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = list(task.columns or lines.pop(0))
    wanted = (*(task.renamed or task.texts), task.label)
    if not set(wanted) <= set(columns):
        raise SystemExit(f"{path} has the columns {columns}, where {task.folder} has {wanted}.")
    *texts, label = (columns.index(name) for name in wanted)
    rows: list[Row] = []
    for line in lines:
        if len(line) <= max(*texts, label) or line[label] == NO_CONSENSUS:
            continue
        answer = line[label]
        if task.classes and answer not in task.classes:
            raise SystemExit(
                f"{path} has the label {answer!r}, and {task.folder} has {', '.join(task.classes)}."
            )
        number = task.classes.index(answer) if task.classes else float(answer)
        rows.append((tuple(line[i].strip() for i in texts), number))
    if lines and not rows:
        raise SystemExit(f"{path} has no row with tabs between {', '.join(columns)}.")
    return rows


def load(
    name: str, folder: Path | None, validation: bool = False, count: int | None = None
) -> tuple[list[Row], list[Row]]:
    """The task's training part and GLUE's development part (for MRPC's files: its test part).

    Args:
        name: a key of `TASKS`.
        folder: of the folders that GLUE has for its tasks; None for the hub.
        validation: instead of the development part, a tenth of the training part, which is left
            out of it: settings are to be chosen here.
        count: rows of the training part, drawn at random, the same each time.
    """
    train, held_out = from_files(TASKS[name], folder) if folder else from_hub(name)
    random.Random(0).shuffle(train)
    if validation:
        tenth = len(train) // 10
        train, held_out = train[tenth:], train[:tenth]
    return train[:count], held_out


def from_files(task: Task, folder: Path) -> tuple[list[Row], list[Row]]:
    """Both parts as the task's authors keep them."""
    folder = folder / task.folder
    return (
        read(folder / task.train, task),
        [row for file in task.held_out for row in read(folder / file, task)],
    )


def from_hub(name: str) -> tuple[list[Row], list[Row]]:
    """Both parts, downloaded."""
    from datasets import load_dataset

    task, data = TASKS[name], load_dataset("nyu-mll/glue", name)
    train, held_out = (
        [(tuple(row[text] for text in task.texts), row["label"]) for row in data[part]]
        for part in ("train", task.validation)
    )
    return train, held_out


def made_up(name: str) -> tuple[list[Row], list[Row]]:
    """A few rows of no meaning in the task's form, with which a script can be tried."""
    task = TASKS[name]
    draw = random.Random(0)
    rows = [
        (
            tuple(" ".join(draw.choices(WORDS, k=8)) for _ in task.texts),
            draw.randrange(len(task.classes)) if task.classes else 5 * draw.random(),
        )
        for _ in range(47)
    ]
    return rows[:32], rows[32:]
