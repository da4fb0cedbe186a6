"""What a Trainer's logs say of sparsity, and from when on it has to be counted for that."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_utils import has_length

import tokengate
from tokengate import History, SparsityReport, TokenGateError
from tokengate.integrations.live_logging import HEATMAP, pixels, report_of, scalars, sparsities
from tokengate.integrations.trainer.surroundings import trainer_that_calls
from tokengate.reports.picture import load_plots
from tokengate.reports.recording import Recorder

# Of which one is in each log of a loss that has been added to.
_TOLD = {"tau_mean", "tau_broken"}


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


class SparsityLogs:
    """What a `TokenGateCallback` adds to logs, and what it counts for that.

    Args:
        details: see there.
        history: likewise.

    Attributes:
        training, evaluation: what is counted of a step that will be logged, and of an evaluation.
        report: of the last evaluation, over all processes; or None.
        unseen: a report that the reporters have not seen, and the name it is logged by; or None.

    Raises:
        TokenGateError: `history` is none; details without matplotlib.
    """

    def __init__(self, details: bool, history: History | None) -> None:
        if details:
            load_plots()  # or an error now, and not after an hour
        if history is not None and not isinstance(history, History):
            raise TokenGateError(
                f"history is a {type(history).__name__}: pass tokengate.History(model)."
            )
        self._details, self._history = details, history
        self.training, self.evaluation = Recording(trained=True), Recording()
        self.report: SparsityReport | None = None
        self.unseen: tuple[str, SparsityReport] | None = None

    def add_to(
        self, logs: dict[str, Any], statistics: Callable[[], dict[str, float]] | None
    ) -> dict[str, float]:
        """Add to `logs` what belongs there, once, and return that.

        Args:
            logs: of a loss, of an evaluation, or of something else.
            statistics: what those of a loss get beside; None where nothing is trained.
        """
        added: dict[str, float] = {}
        prefix = evaluated(logs)
        if prefix and f"{prefix}_sparsity" not in logs:
            added |= self._measured(f"{prefix}_", report_of(self.evaluation.take()))
        elif "loss" in logs and not _TOLD & logs.keys() and statistics is not None:
            report = report_of(self.training.take())
            added |= self._measured("", report) | statistics()
            if self._history is not None:
                step = trainer_that_calls().state.global_step
                if self._history.steps[-1:] != [step]:  # unless it has been told, with the report
                    self._history.log(step, loss=logs["loss"], report=report)
        logs.update(added)
        return added

    def _measured(self, prefix: str, report: SparsityReport | None) -> dict[str, float]:
        """What a log gets of a report."""
        if report is None:
            return {}
        if prefix:
            self.report = report
        if not self._details:
            return {f"{prefix}sparsity": report.sparsity}
        self.unseen = f"{prefix}{HEATMAP}", report
        found = sparsities(report) if prefix else scalars(trainer_that_calls().model, report)
        return {f"{prefix}{name}": value for name, value in found.items()}

    def draw(self, state: TrainerState) -> None:
        """Give a heatmap to the reporters, if there is one that they have not seen."""
        if self.unseen is not None and state.is_world_process_zero:
            callbacks = trainer_that_calls().callback_handler.callbacks
            log_heatmap(callbacks, *self.unseen, state.global_step)
        self.unseen = None

    def drop(self) -> None:
        """Forget what was counted and is in no log."""
        self.training.drop()
        self.evaluation.drop()


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


def evaluated_at(state: TrainerState, step: int | None) -> list[float]:
    """The sparsity of each evaluation after a step, as it was logged."""
    keys = [f"{evaluated(log)}_sparsity" for log in state.log_history]
    found = zip(keys, state.log_history, strict=True)
    return [log[key] for key, log in found if log.get("step") == step and key in log]


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
