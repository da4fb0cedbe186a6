"""The commonsense tasks in the form of LLM-Adapters: their files, prompts, answers and settings.

A row has an `instruction`, which spells the question and its choices out, an `input`, empty here,
an `output`, "the correct answer is answer3", and the `answer` alone. Form, prompt and how an
answer is found in a response are those of github.com/AGI-Edgerunners/LLM-Adapters (Hu et al.,
2023), whose finetune.py and commonsense_evaluate.py the paper's section 4.1 goes back to.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from made_up import WORDS
from packed import read_bytes

Row = dict[str, str]
ALL = "commonsense_170k.json"


@dataclass(frozen=True)
class Task:
    """One of the eight: where its rows stand, and how it spells its answers."""

    folder: str
    answers: tuple[str, ...]

    def answer(self, response: str) -> str | None:
        """The first answer in a generated text; None without any."""
        found = re.search("|".join(self.answers), response)
        return found and found[0]


def numbered(name: str, count: int) -> tuple[str, ...]:
    """Answers as the tasks spell them: name1, name2..."""
    return tuple(f"{name}{number}" for number in range(1, count + 1))


# As Table 1 has them. ARC has a few questions with a fifth answer.
TASKS = {
    "PIQA": Task("piqa", numbered("solution", 2)),
    "BoolQ": Task("boolq", ("true", "false")),
    "HellaSwag": Task("hellaswag", numbered("ending", 4)),
    "WinoGrande": Task("winogrande", numbered("option", 2)),
    "SIQA": Task("social_i_qa", numbered("answer", 5)),
    "OBQA": Task("openbookqa", numbered("answer", 5)),
    "ARC-e": Task("ARC-Easy", numbered("answer", 5)),
    "ARC-c": Task("ARC-Challenge", numbered("answer", 5)),
}

# The arguments of commonsense.py that are the paper's: Table 6 for all methods (AdaLoRA starts at
# twice the rank, section 4.1), s of Table 1 and section A.4.
TABLE_6 = {
    "rank": 32,
    "scale": 0.5,
    "dropout": 0.05,
    "lr": 1e-4,
    "scheduler": "linear",
    "batch_size": 16,
    "epochs": 3,
    "s": 4e-5,
}
# Table 1: lambda. The paper has no adapter here; it takes LoRA's.
TABLE_1 = {"lora": 4.5e-5, "dora": 1e-5, "adalora": 1e-4, "adapter": 4.5e-5}


def prompt(row: Row) -> str:
    """What is before the response: Alpaca's template.

    LLM-Adapters' code indents its lines by the way, which is left out here.
    """
    context = ", paired with an input that provides further context" if row["input"] else ""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
    )


def read(path: Path) -> list[Row] | None:
    """The rows of one file, also compressed with xz; None where there is neither."""
    try:
        rows: list[Row] = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    return rows


def load(place: Path) -> tuple[list[Row], dict[str, list[Row]], list[str]]:
    """The rows to train on, those of each test, and what of the eight tasks was not found.

    Args:
        place: the folder of the tasks' folders, each with test.json and perhaps train.json. To
            train on: commonsense_170k.json in it, else every train.json. Or another file to train
            on, beside the tasks' folders.
    """
    folder = place if place.is_dir() else place.parent
    together = read(place / ALL if place.is_dir() else place)
    if together is None and not place.is_dir():
        raise SystemExit(f"there is no {place}: pass as --data a folder or a file that there is.")
    train, tests, missing = together or [], {}, []
    for name, task in TASKS.items():
        rows = {part: read(folder / task.folder / f"{part}.json") for part in ("train", "test")}
        if rows["test"] is None:
            missing.append(f"{name} (test)")
        else:
            tests[name] = rows["test"]
        if together is None and rows["train"] is None:
            missing.append(f"{name} (train)")
        elif together is None:
            train += rows["train"]
    if not train or not tests:
        raise SystemExit(
            f"{place} has no rows to {'train on' if tests else 'test with'}: pass as --data a "
            "folder with piqa/test.json, boolq/test.json... and train.json beside each or "
            f"{ALL} for all."
        )
    return train, tests, missing


def drawn(rows: list[Row], count: int | None) -> list[Row]:
    """All rows or so many, in a random order that is the same each time."""
    return random.Random(0).sample(rows, min(len(rows), count or len(rows)))


def made_up() -> tuple[list[Row], dict[str, list[Row]]]:
    """A few rows of no meaning in the tasks' form, with which a script can be tried."""
    draw = random.Random(0)

    def row(task: Task) -> Row:
        question = " ".join(draw.choices(WORDS, k=draw.randrange(4, 12)))
        choices = " ".join(f"{a.title()}: {draw.choice(WORDS)}" for a in task.answers)
        answer = draw.choice(task.answers)
        form = f"Answer format: {'/'.join(task.answers)}"
        return {
            "instruction": f"Please choose: {question}?\n\n{choices}\n\n{form}",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }

    tests = {name: [row(task) for _ in range(8)] for name, task in TASKS.items()}
    return [row(task) for task in TASKS.values() for _ in range(8)], tests
