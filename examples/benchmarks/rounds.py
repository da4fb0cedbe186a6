"""Timing in turns, so that what else the machine does meets all that are compared."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable

import torch
from tqdm import tqdm


def timed(
    steps: dict[str, Callable[[], object]], rounds: int, warmup: int, seed: int, title: str
) -> dict[str, list[float]]:
    """Seconds of every round's step of each, which come in another order every round."""
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(warmup + rounds), desc=title, leave=False):
        gc.collect()
        gc.disable()  # or it frees one's garbage while another is timed
        for name in order.sample(list(steps), len(steps)):
            _wait()
            begin = time.perf_counter()
            steps[name]()
            _wait()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
        gc.enable()
    return seconds


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
