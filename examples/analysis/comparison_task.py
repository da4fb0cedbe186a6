"""What a task of the comparison is: a base, three parts of data, a score, and the base's own data.

Every task is made from a folder of data (`--data`); what is made of it once, a base that is
pretrained, texts that are sampled, lies in a cache. Settings are chosen on `validation` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from recipe_results import keep
from torch import Tensor, nn

Batch = dict[str, Tensor]
PARTS = ("validation", "test")


class Task:
    """One base and one data set.

    Attributes:
        measure: what the score is, for the tables.
        sign: 1 where more is better, -1 where less is.
        rank: of the modification, where it is not what is compared.
        rates: learning rates to begin tuning with; the middle one is the default.
        steps: of every run, however few rows there are.
        head: what is trained beside the modifications.
    """

    measure: str
    sign: int
    rank: int
    rates: tuple[float, ...]
    steps: int
    size: int
    head: tuple[str, ...] = ()

    def __init__(self, data: Path, cache: Path) -> None:
        self.data, self.cache = data, cache

    def lacks(self) -> str | None:
        """Why it cannot be run here; None if it can."""
        return next((f"there is no {path}" for path in self.needs() if not path.exists()), None)

    def needs(self) -> list[Path]:
        """The files that it reads."""
        raise NotImplementedError

    def model(self, seed: int) -> nn.Module:
        """The base, with a head of this seed."""
        raise NotImplementedError

    def targets(self, model: nn.Module) -> list[str]:
        """The layers that are modified."""
        raise NotImplementedError

    def batches(self, seed: int, rows: int | None) -> Iterator[Batch]:
        """`steps` batches of the training part, or of so many rows of it, with labels."""
        raise NotImplementedError

    def score(self, model: nn.Module, part: str) -> float:
        """On the validation or the test part."""
        raise NotImplementedError

    @cached_property
    def own(self) -> list[Batch]:
        """What the base knew before, on which drift is measured."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of one batch."""
        loss: Tensor = model(**batch).loss
        return loss

    def order(self, count: int, seed: int) -> Iterator[list[int]]:
        """Places of `steps` batches in `count` rows, epoch after epoch."""
        draw = torch.Generator().manual_seed(seed)
        left: list[int] = []
        for _ in range(self.steps):
            while len(left) < self.size:
                left += torch.randperm(count, generator=draw).tolist()
            yield left[: self.size]
            left = left[self.size :]

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, from the cache if it is there."""
        file = self.cache / f"{name}.pt"
        if not file.exists():
            made = make()
            keep(file, lambda new: torch.save(made, new))
        return torch.load(file, weights_only=True)
