"""What a callback has to find out by itself: who calls it, from where on, the optimiser inside."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer

from tokengate import TokenGateError


def trainer_that_calls() -> Trainer:
    """It calls its callbacks without telling them who it is, but it is on the stack."""
    for frame in _frames_of_trainers():
        trainer: Trainer = frame.f_locals["self"]
        return trainer
    raise TokenGateError(
        "TokenGateCallback was called by no transformers.Trainer: give it to one as a callback."
    )


def resumed_from() -> Path | None:
    """The checkpoint that the training which calls goes on from, or None; from the stack, too."""
    for frame in _frames_of_trainers():
        checkpoint = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(checkpoint, str | Path):
            return Path(checkpoint)
    return None


def _frames_of_trainers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            yield frame
        frame = frame.f_back


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser that Accelerate wrapped."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TokenGateError(
            f"TokenGateCallback found a {type(optimizer).__name__} as the Trainer's optimizer: use "
            "one of torch.optim's kind."
        )
    return optimizer
