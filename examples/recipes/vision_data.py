"""Pictures and their classes: folders of classes, archives of them, idx files, and digits."""

from __future__ import annotations

import functools
import gzip
import io
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Picture = bytes | Path | np.ndarray  # a file in memory, a file, or pixels
Row = tuple[Picture, int]  # and the class
Named = tuple[Picture, str]  # and the class's name

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class Pictures(torch.utils.data.Dataset):
    """Rows as the Trainer wants them, opened when they are asked for."""

    def __init__(self, rows: list[Row], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, label = self.rows[index]
        if isinstance(picture, np.ndarray):
            image = Image.fromarray(picture)
        else:
            image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
        return {"pixel_values": self.transform(image.convert("RGB")), "labels": label}


# Of data sets that number their classes: in words.
SPOKEN = {
    "fashion-mnist": [
        "T-shirt",
        "trousers",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "boot",
    ],
    "mnist": [f"digit {number}" for number in range(10)],
    "digits": [f"digit {number}" for number in range(10)],
}


def spoken(name: str, classes: list[str]) -> list[str]:
    """The classes of a data set as they are to be read."""
    words = dict(zip(map(str, range(10)), SPOKEN.get(name, ()), strict=False))
    return [words.get(label, label.replace("_", " ")) for label in classes]


@functools.cache  # every run of a recipe asks for the same
def load(
    name: str, folder: Path | None = None, validation: bool = False, count: int | None = None
) -> tuple[list[Row], list[Row], list[str]]:
    """The training part of a data set, its test part (or `val`, where it has none), its classes.

    Args:
        name: `digits`, scikit-learn's, or the name of the data set's own folder within `folder`.
            There are files in the idx format, as MNIST's and Fashion-MNIST's are called, or
            pictures as PART/CLASS/FILE, also in one archive (.tar, .tar.gz, .tar.xz).
        folder: of the data sets' folders.
        validation: instead of the test part, a tenth of the training part, which is left out of
            it: settings are to be chosen here.
        count: rows of the training part, drawn at random, the same each time.
    """
    if name == "digits":
        train, held_out = digits()
    elif folder is None:
        raise SystemExit(f"{name} is read from files: pass --data, the folder that has {name}/.")
    else:
        train, held_out = from_files(folder / name)
    classes = sorted({label for _, label in train})
    unknown = {label for _, label in held_out} - set(classes)
    if unknown:
        raise SystemExit(
            f"{name} has pictures of {min(unknown)} to be tested on, but none to train on: "
            "give both parts the same classes."
        )
    for part in (train, held_out):
        random.Random(0).shuffle(part)
    if validation:
        tenth = len(train) // 10
        train, held_out = train[tenth:], train[:tenth]
    number = {label: index for index, label in enumerate(classes)}
    first, second = (
        [(picture, number[label]) for picture, label in part] for part in (train[:count], held_out)
    )
    return first, second, classes


def digits() -> tuple[list[Named], list[Named]]:
    """scikit-learn's scans of handwritten digits, which need no file."""
    found = load_digits()
    pixels = (found.images * (255 / found.images.max())).astype(np.uint8)
    rows = list(zip(pixels, map(str, found.target), strict=True))
    train, held_out = train_test_split(rows, test_size=500, random_state=0)
    return train, held_out


def from_files(folder: Path) -> tuple[list[Named], list[Named]]:
    """Both parts of a data set, in whichever form they are."""
    if any(folder.glob("train-images-idx3-ubyte*")):
        return from_idx(folder, "train"), from_idx(folder, "t10k")
    parts: dict[str, list[Named]] = {}
    for name, picture in files(folder):
        if name.suffix.lower() in ENDINGS:
            parts.setdefault(name.parts[-3], []).append((picture, name.parts[-2]))
    held_out = parts.get("test") or parts.get("val")
    if "train" not in parts or not held_out:
        raise SystemExit(
            f"{folder} has pictures in {sorted(parts) or 'no part'}: put them as "
            "train/CLASS/FILE and test/CLASS/FILE (or val/CLASS/FILE)."
        )
    return parts["train"], held_out


def files(folder: Path) -> Iterator[tuple[PurePath, Picture]]:
    """PART/CLASS/FILE by name, of the folder or of the archives in it."""
    yield from ((path, path) for path in sorted(folder.glob("*/*/*")))
    for path in sorted(folder.glob("*.tar*")):
        with tarfile.open(path) as archive:  # in the archive's order: others are slow to read
            for member in archive:
                name = PurePath(member.name)
                if member.isfile() and len(name.parts) > 2:
                    yield name, archive.extractfile(member).read()


def from_idx(folder: Path, part: str) -> list[Named]:
    """A part whose pictures and labels are two files."""
    pictures = idx(folder / f"{part}-images-idx3-ubyte")
    labels = idx(folder / f"{part}-labels-idx1-ubyte")
    return list(zip(pictures, map(str, labels), strict=True))


def idx(path: Path) -> np.ndarray:
    """Bytes in the shape that the file begins with, also compressed with gzip."""
    packed = path.with_name(path.name + ".gz")
    data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    axes = data[3]
    shape = np.frombuffer(data, ">i4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
