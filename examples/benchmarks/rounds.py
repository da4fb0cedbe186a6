"""Measuring in turns, so that what else the machine does meets all that are compared."""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

Measurements = dict[str, list[float]]


def in_turns(
    measures: dict[str, Callable[[], float]], options: argparse.Namespace, title: str
) -> Measurements:
    """What each found in every round; they come in another order every round."""
    order = random.Random(options.seed)
    found: Measurements = {name: [] for name in measures}
    for turn in tqdm(range(options.warmup + options.rounds), desc=title, leave=False):
        gc.collect()
        gc.disable()  # or it frees one's garbage while another is measured
        for name in order.sample(list(measures), len(measures)):
            value = measures[name]()
            if turn >= options.warmup:
                found[name].append(value)
        gc.enable()
    return found


def timed(
    steps: dict[str, Callable[[], object]], options: argparse.Namespace, title: str
) -> Measurements:
    """Milliseconds of every round's step of each."""

    def timing(step: Callable[[], object]) -> float:
        _wait()
        begin = time.perf_counter()
        step()
        _wait()
        return 1e3 * (time.perf_counter() - begin)

    measures = {name: partial(timing, step) for name, step in steps.items()}
    return in_turns(measures, options, title)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
