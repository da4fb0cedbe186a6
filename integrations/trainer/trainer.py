"""What a callback cannot do from inside: a Trainer that counts, logs and saves with its gates."""

from __future__ import annotations

import contextlib
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
from tokengate.integrations.trainer.engines import sharding_of
from tokengate.integrations.trainer.quantised import attached
from tokengate.sharding import is_divided

# What ends when a Trainer is made. Not in the Trainer, which is pickled to prepare its data.
_MAKING: dict[int, contextlib.ExitStack] = {}


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
    A patched model may be quantised, with 4 or 8 bits. For another kind of Trainer:
    `class MyTrainer(TokenGateTrainer, OtherTrainer)`, which `tokengate.integrations.trl.gated`
    makes.

    Raises:
        TokenGateError: when it is used, there is no `TokenGateCallback` among its callbacks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.ExitStack() as making:
            _MAKING[id(self)] = making
            making.callback(_MAKING.pop, id(self))
            making.enter_context(attached(args[0] if args else kwargs.get("model")))
            super().__init__(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's; what it makes may be quantised, too."""
        model = super().call_model_init(trial)
        if id(self) in _MAKING:
            _MAKING[id(self)].enter_context(attached(model))
        return model

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

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        if sharding_of(self.accelerator) == "ZeRO":
            self._callback().before_division(self.model)
        return super().create_optimizer(*args, **kwargs)

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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._callback().save_state(Path(output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; what is divided over processes is not gathered but for the adapter."""
        if not sharding_of(self.accelerator) or self._has_statistics():
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _has_statistics(self) -> bool:
        return any(getattr(m, "running_mean", None) is not None for m in self.model.modules())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._has_statistics():
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save or is_divided(self.model.parameters()):
            tokengate.save(self.model, folder, report=self._callback().report)
        if self.args.should_save:
            processing = self.processing_class
            if processing is None:  # as the Trainer does
                processing = getattr(self.data_collator, "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if config_path(Path(resume_from_checkpoint)).exists():
            tokengate.load(model or self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        # ZeRO has values of its own beside the model's.
        if config_path(best).exists() and sharding_of(self.accelerator) != "ZeRO":
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
