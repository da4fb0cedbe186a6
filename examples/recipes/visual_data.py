"""Conversations about pictures: LLaVA's training format, and the tests of ScienceQA and POPE.

The prompt is that of LLaVA-1.5 ("vicuna_v1"), and answers are read as LLaVA's own evaluation does
(github.com/haotian-liu/LLaVA: llava/conversation.py, llava/eval/eval_science_qa.py and
eval_pope.py), so that scores can be compared with published ones.
"""

from __future__ import annotations

import io
import json
import random
import re
import statistics
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packed import read_bytes
from PIL import Image
from sklearn.metrics import f1_score

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<image>"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
ARCHIVE = "easy_vqa.tar.xz"


@dataclass(frozen=True)
class Row:
    """A conversation about a picture, or about none."""

    turns: tuple[str, ...]
    """Question, answer, question, answer... without a mark for the picture."""
    image: Path | bytes | None = None
    """A file, or what is in one."""
    part: str = ""
    """Which part of a test it is from, where parts are scored apart and averaged."""


@dataclass(frozen=True)
class Test:
    """Questions whose first answer is to be given."""

    rows: list[Row]
    letters: bool = False
    """Answers are letters; otherwise yes or no."""
    metric: str = "accuracy"
    """Which of `score` is published first."""
    asked: int | None = None
    """How many questions the test has, where some are left out because their picture lacks."""


def prompt(row: Row, end: str) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and from where to where in it its answers stand.

    An answer begins with the space before it and ends with `end`, which the model must learn to
    say.
    """
    text, spans = SYSTEM + " ", []
    for i, turn in enumerate(row.turns):
        if i % 2:
            spans.append((len(text), len(text) + len(f" {turn}{end}")))
            text += f" {turn}{end}"
        else:
            picture = f"{IMAGE}\n" if row.image is not None and i == 0 else ""
            text += f"USER: {picture}{turn} ASSISTANT:"
    return text, spans


def question(row: Row) -> str:
    """The text up to the first answer."""
    text, ((begin, _), *_) = prompt(row, "")
    return text[:begin]


def picture(row: Row, background: tuple[int, ...]) -> Image.Image:
    """In colour, and filled up to a square, as LLaVA-1.5 has it."""
    file = io.BytesIO(row.image) if isinstance(row.image, bytes) else row.image
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def letter(text: str) -> str | None:
    """The answer of a multiple choice: `B`, `B. because...` or `The answer is B`."""
    alone = re.match(r"\s*([A-E])(?:\s*$|\. |\n)", text)
    found = alone or re.search(r"The answer is ([A-E])", text)
    return found and found[1]


def yes_or_no(text: str) -> str:
    """What an answer comes down to: no, if its first sentence has a no or a not, otherwise yes."""
    words = text.partition(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score(test: Test, answers: list[str]) -> dict[str, float]:
    """Accuracy; of yes and no also F1 and the share of yes. Of parts each, and their mean."""
    parts: dict[str, list[tuple[str, str | None]]] = {}
    understand = letter if test.letters else yes_or_no
    for row, answer in zip(test.rows, answers, strict=True):
        parts.setdefault(row.part, []).append((row.turns[1], understand(answer)))
    found = {}
    for part, pairs in parts.items():
        truth, given = zip(*pairs, strict=True)
        found[part] = {"accuracy": statistics.fmean(a == b for a, b in pairs)}
        if not test.letters:
            f1 = f1_score(truth, given, pos_label="yes", zero_division=0)
            found[part] |= {"f1": float(f1), "yes": given.count("yes") / len(given)}
    means = {name: statistics.fmean(each[name] for each in found.values()) for name in found[part]}
    return means | {
        f"{name}, {part}": v for part in found if part for name, v in found[part].items()
    }


def unpacked(path: Path) -> dict[str, bytes]:
    """The files of an archive by their names; none, where there is no archive."""
    if not path.exists():
        return {}
    with tarfile.open(path) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}


def conversations(
    rows: list[dict[str, Any]], folder: Path, images: Mapping[str, bytes] | None = None
) -> list[Row]:
    """LLaVA's format: `{"image": ..., "conversations": [{"from": "human", "value": ...}, ...]}`.

    Args:
        rows: as JSON has them.
        folder: that the images' names start from.
        images: those that are at hand already, by their names.
    """
    found = []
    for row in rows:
        turns = row["conversations"]
        if turns[0]["from"] != "human":
            turns = turns[1:]  # LLaVA leaves an answer to nothing out
        speakers = [turn["from"] for turn in turns]
        if speakers != ["human", "gpt"] * (len(turns) // 2) or not turns:
            raise SystemExit(
                f"conversation {row.get('id')} is of {', '.join(speakers) or 'nobody'}: human and "
                "gpt must take turns."
            )
        name = row.get("image")
        image = None if name is None else (images or {}).get(name, folder / name)
        # The mark goes to the front of the first question, wherever it was.
        values = (turn["value"].replace(IMAGE, "").strip() for turn in turns)
        found.append(Row(tuple(values), image))
    return found


def at_hand(rows: list[Row]) -> list[Row]:
    """Those whose picture there is, or that need none."""
    return [row for row in rows if not isinstance(row.image, Path) or row.image.is_file()]


def science_qa(folder: Path) -> Test:
    """Its questions with a picture: llava_test_CQM-A.json, and the pictures in images/test."""
    listed = [
        row for row in json.loads(read_bytes(folder / "llava_test_CQM-A.json")) if "image" in row
    ]
    packed = unpacked(folder / "images_small.tar.xz")
    rows = conversations(listed, folder / "images/test", packed)
    rows = [Row((row.turns[0] + LETTER, *row.turns[1:]), row.image) for row in rows]
    return Test(at_hand(rows), letters=True, asked=len(rows))


def pope(folder: Path) -> Test:
    """Its three parts: coco_pope_random.json..., and the pictures in val2014."""
    rows = [
        Row((one["text"] + SHORT, one["label"]), folder / "val2014" / one["image"], part)
        for part in ("random", "popular", "adversarial")
        for one in map(json.loads, read_bytes(folder / f"coco_pope_{part}.json").splitlines())
    ]
    return Test(at_hand(rows), metric="f1", asked=len(rows))


def easy_vqa(folder: Path) -> tuple[list[Row], Test]:
    """easy-VQA: all that is asked of a training picture as one conversation; yes and no as a test.

    Several questions of a picture become the turns of one conversation, as LLaVA-1.5's own
    training data have those of VQAv2.
    """
    files = unpacked(folder / ARCHIVE)

    def part(name: str) -> list[tuple[str, str, Path | bytes]]:
        where = f"{name}/questions.json"
        text = files[where].decode() if files else (folder / where).read_text("utf-8")
        images = (f"{name}/images/{number}.png" for *_, number in json.loads(text))
        return [
            (asked, answer, files.get(image, folder / image))
            for (asked, answer, _), image in zip(json.loads(text), images, strict=True)
        ]

    turns: dict[Path | bytes, list[str]] = {}
    for asked, answer, image in part("train"):
        before = turns.setdefault(image, [])
        before += [asked if before else asked + SHORT, answer]
    test = [Row((asked + SHORT, answer), image) for asked, answer, image in part("test")]
    return [Row(tuple(each), image) for image, each in turns.items()], Test(
        [row for row in test if row.turns[1] in ("yes", "no")]
    )


def load(
    folder: Path, train: Path | None = None, images: Path | None = None
) -> tuple[list[Row], dict[str, Test]]:
    """Training rows and tests.

    Args:
        folder: of the tests' folders, each of which may lack: scienceqa, pope, easy-vqa.
        train: conversations in LLaVA's format; None for those of easy-VQA.
        images: of the conversations; None for the folder that they are in.
    """
    tests, rows = {}, []
    # Their folders' names may have an ending, such as scienceqa_test.
    for title, name, test in (("SQA", "scienceqa", science_qa), ("POPE", "pope", pope)):
        for place in sorted(folder.glob(f"{name}*"))[:1]:
            tests[title] = test(place)
    if (folder / "easy-vqa").exists():
        rows, tests["easy-VQA"] = easy_vqa(folder / "easy-vqa")
    if train:
        rows = conversations(json.loads(read_bytes(train)), images or train.parent)
    if not rows or not any(test.rows for test in tests.values()):
        raise SystemExit(
            f"{folder} has no {'test' if rows else 'training rows'}: it must have a folder "
            "scienceqa, pope or easy-vqa with pictures, and --train a file unless it has easy-vqa."
        )
    lacking = len(rows) - len(at_hand(rows))
    if lacking:
        place = images or (train.parent if train else folder / "easy-vqa")
        raise SystemExit(
            f"{lacking} of {len(rows)} conversations are about pictures that are not in {place}: "
            "--images says where the names of those of --train begin."
        )
    random.Random(0).shuffle(rows)
    return rows, tests


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 220), "black": (0, 0, 0)}


def made_up() -> tuple[list[Row], dict[str, Test]]:
    """Plain pictures and what colour they are, with which a script can be tried."""
    draw, letters, yes_no, train = random.Random(0), [], [], []
    for i in range(32):
        colour, other = draw.sample(list(COLOURS), 2)
        file = io.BytesIO()
        Image.new("RGB", (draw.randint(20, 60), 40), COLOURS[colour]).save(file, "PNG")
        image = file.getvalue()
        choices = draw.sample([colour, other], 2)
        options = f"Which colour is it?\nA. {choices[0]}\nB. {choices[1]}{LETTER}"
        chosen = Row((options, "AB"[choices.index(colour)]), image)
        asked = draw.choice([colour, other])
        answer = "yes" if asked == colour else "no"
        short = Row((f"Is it {asked}?{SHORT}", answer), image)
        if i < 8:
            letters.append(chosen)
            yes_no.append(short)
        else:
            train.append(Row((*short.turns, "Which colour is it?", colour), image))
            train.append(chosen)
    train += [Row(("Is red a colour?", "yes")), Row(("Is a dog a colour?", "no"))]
    return train, {"SQA": Test(letters, letters=True), "POPE": Test(yes_no, metric="f1")}
