"""What a Trainer's logs say of sparsity, and from when on it has to be counted for that."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_utils import has_length

import tokengate
from tokengate import SparsityReport
from tokengate.integrations.live_logging import pixels
from tokengate.reports.recording import Recorder


class Recording:
    """A `tokengate.record` that begins in one event and ends in another.

    Args:
        trained: whether what is run without gradients is no part of it.
    """

    def __init__(self, trained: bool = False) -> None:
        self._trained = trained
        self._stack = contextlib.ExitStack()
        self._recorder: Recorder | None = None
        self.runs = False

    def start(self, model: nn.Module) -> None:
        """Count from here on, unless it does already."""
        if not self.runs:
            recording = tokengate.record(model, trained=self._trained)
            self._recorder = self._stack.enter_context(recording)
            self.runs = True

    def stop(self) -> None:
        """Count no more; what was counted stays."""
        self._stack.close()
        self.runs = False

    def drop(self) -> None:
        """Forget it."""
        self.stop()
        self._recorder = None

    def take(self) -> Recorder | None:
        """What was recorded up to here; nothing of it is taken again."""
        recorder = self._recorder
        self.drop()
        return recorder


def will_be_logged(args: Any, state: Any, loader: Any) -> bool:
    """Whether the Trainer is going to log after the step that begins."""
    step = state.global_step + 1
    if args.logging_strategy == "steps":
        first = step == 1 and args.logging_first_step
        return bool(first or step % state.logging_steps == 0)
    if args.logging_strategy != "epoch" or not has_length(loader):
        return False
    per_epoch = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
    return bool(step % per_epoch == 0 or step == state.max_steps)


def evaluated(logs: Mapping[str, Any]) -> str | None:
    """The prefix of an evaluation's metrics, or None if these are not an evaluation's."""
    prefixes = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]
    return prefixes[0] if prefixes and prefixes[0] != "train" else None


def log_heatmap(callbacks: Iterable[Any], name: str, report: SparsityReport, step: int) -> None:
    """To the TensorBoard and the W&B callback among a Trainer's, if they are there.

    `name` is that of a log; the image gets the tag that these give to such a number.
    """
    (tag,) = rewrite_logs({name: 0.0})
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(tag, pixels(report), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            image = callback._wandb.Image(pixels(report))
            callback._wandb.log({tag: image, "train/global_step": step})
