"""What a callback cannot do from inside: a Trainer that counts, logs and saves with its gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

import tokengate
from tokengate import TokenGateError
from tokengate.adapters.folder import config_path
from tokengate.integrations.trainer.callback import TokenGateCallback
from tokengate.integrations.trainer.checkpoints import begin, check_whole, last_checkpoint, step_of


class TokenGateTrainer(Trainer):
    """What `TokenGateCallback` cannot do from inside a callback; it needs one:

        trainer = TokenGateTrainer(model, args, callbacks=[TokenGateCallback(s=5e-4)])

    TensorBoard and the other reporters are told of a log before any callback of the user's, and
    `evaluate` and `predict` outside of a training announce themselves to nobody. Here the reporters
    get sparsity and tau, too, and both have a `*_sparsity` among their metrics. A training that is
    interrupted or fails leaves the model as one that ended. Its checkpoints, and `save_model`, have
    the adapter in the place of the whole model, unless this has running statistics (BatchNorm),
    which are no part of an adapter; `tokengate.load` reads them, and the table of the last
    evaluation is in their card. A training goes on from those that were saved to their end alone.
    For another kind of Trainer:
    `class MyTrainer(TokenGateTrainer, SFTTrainer)`.

    Raises:
        TokenGateError: when it is used, there is no `TokenGateCallback` among its callbacks.
    """

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; True means the last checkpoint that was saved to its end.

        Raises:
            TokenGateError: a checkpoint was asked for, by its name or by True, and what is there
                was not saved to its end.

        Warns:
            UserWarning: a later checkpoint than the one that is taken was not.
        """
        callback = self._callback()
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = last_checkpoint(Path(self.args.output_dir)) or True
        elif checkpoint and step_of(Path(checkpoint)) is not None and Path(checkpoint).is_dir():
            check_whole(Path(checkpoint))
        try:
            return super().train(checkpoint, *args, **kwargs)
        except BaseException:
            callback.end_training(self.model)
            raise

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, counted."""
        self._callback().start_evaluation(self.model)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with sparsity and tau."""
        self._callback().add_to(logs)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            begin(folder / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if any(getattr(m, "running_mean", None) is not None for m in self.model.modules()):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            tokengate.save(self.model, folder, report=self._callback().report)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if config_path(Path(resume_from_checkpoint)).exists():
            tokengate.load(model or self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if config_path(best).exists():
            tokengate.load(self.model, best)
        else:
            super()._load_best_model()

    def _callback(self) -> TokenGateCallback:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TokenGateCallback):
                return callback
        raise TokenGateError(
            "a TokenGateTrainer was given no TokenGateCallback: pass "
            "callbacks=[TokenGateCallback(s=...)]."
        )
