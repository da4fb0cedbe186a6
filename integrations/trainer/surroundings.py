"""What a callback has to find out by itself: the Trainer that calls it, the optimiser inside."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer

from tokengate import TokenGateError


def trainer_that_calls() -> Trainer:
    """It calls its callbacks without telling them who it is, but it is on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise TokenGateError(
        "TokenGateCallback was called by no transformers.Trainer: give it to one as a callback."
    )


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
