"""Everything that training a gate wants, as a callback of Hugging Face's Trainer.

The Trainer makes its optimiser, and loads a checkpoint into it, before a callback is asked. So the
taus stay in that optimiser's groups, which therefore load as they were saved; but at every step
their gradients are taken out of its sight and given to an Adam of their own. What is taken has
neither weight decay nor a schedule, whatever the optimiser is and whoever made it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import tokengate
from tokengate import History, RankAllocator, SparsityReport, SparsitySchedule, TokenGateError
from tokengate.arguments import non_negative, switch
from tokengate.integrations.callbacks import (
    Leading,
    refuse_allocation,
    resume,
    tau_numbers,
)
from tokengate.integrations.trainer.checkpoints import read_state, step_of, write_state
from tokengate.integrations.trainer.engines import FSDP2, Engine, Zero, engine_of
from tokengate.integrations.trainer.gradients import Gradients
from tokengate.integrations.trainer.sparsity_logs import SparsityLogs, evaluated_at, will_be_logged
from tokengate.integrations.trainer.surroundings import resumed_from, trainer_that_calls, unwrapped
from tokengate.integrations.trainer.tau_steps import KEY, TauSteps, state_of
from tokengate.layers.patched import require_layers
from tokengate.methods.adalora import AdaLoRA
from tokengate.sharding import in_processes, is_absent
from tokengate.training.leading.unreached import say_if_early
from tokengate.training.scale_penalty import set_unit

_log = logging.getLogger(__name__)


class TokenGateCallback(TrainerCallback):
    """Trains the gates of a patched model in any `transformers.Trainer`.

    - tau moves by eq. 18-22 with learning rate alpha * s, constant under any scheduler, without
      weight decay, whatever `optim` is.
    - tau's gradient is no part of the norm by which `max_grad_norm` clips the others, and is not
      clipped: what the Trainer's accelerator clips is all but the taus.
    - lambda has its unit: tau moves alike on 1 or 8 processes, with 1 or 16 micro-batches, and
      under a GradScaler, whose skipped steps leave tau and its Adam state as they were.
    - AdaLoRA layers get their penalty and a `RankAllocator` over `state.max_steps`. The penalty's
      gradient is added to the loss's before it is clipped, once a step, which is the same as
      adding the penalty to the loss; the loss that is logged is without it.
    - Each log of the loss has `sparsity`, `tau_mean`, `tau_min`, `tau_max`, `tau_skipped` and
      `tau_broken` as soon as a gradient or a tau was not finite, and with AdaLoRA
      `orthogonality`; each evaluation during training has `eval_sparsity`. Both are eq. 23 over
      all processes. `sparsity` is that of the step that is logged alone, in training mode, with
      dropout and before its update, because counting at every step would cost time at every step;
      of what a step runs without gradients, as `generate` and a reference, nothing is counted.
      It is missing where that step is not known before: with `logging_strategy="epoch"` and data
      without a length. On several processes `eval_sparsity` counts twice the samples that
      Accelerate repeats to fill their last batches.
    - The optimiser's part of a checkpoint has it all, so that a run that is resumed ends as one
      that was never stopped. Of several processes each has a file of its own for it.

    What a callback cannot do is left to `TokenGateTrainer`.

    Args:
        s: slope of eq. 11, the farthest tau moves in one step; None for what `param_groups` chooses
            for as many `total_steps` as the Trainer takes.
        alpha: learning rate of eq. 22, which multiplies s.
        betas: Adam's decay rates for tau.
        eps: of eq. 22.
        schedule: True lets the Trainer's scheduler multiply tau's learning rate, too.
        orthogonality: weight of AdaLoRA's penalty, where the model has AdaLoRA layers.
        allocator: options of the `RankAllocator` other than `total_steps`.
        target_sparsity: the sparsity to which a `tokengate.SparsitySchedule` leads all gates over
            the steps of the training, whatever the numbers of tau's own rule.
        target_warmup: with `target_sparsity`, steps before the share of closed positions begins to
            rise, 0 by default: an int for their number, a float in [0, 1) for their share of the
            training's.
        settle: with `target_sparsity`, False for last thresholds as they were followed, so that the
            model is not called again for them; see the schedule. True by default.
        details: True adds to the logs of the loss and of evaluations the sparsity of every
            projection, e.g. `sparsity_q_proj`, and to those of the loss the average lambda,
            `penalty`; and gives TensorBoard and Weights & Biases, where they are told of such a
            log, a heatmap by layer and projection, `train/sparsity_heatmap`. Wants matplotlib.
        history: a `tokengate.History` of the model, which is told of each log of the loss.

    Attributes:
        allocator: the `RankAllocator`, from the beginning of the training on; or None.
        sparsity_schedule: the `SparsitySchedule`, likewise.

    Raises:
        TokenGateError: a number is out of its range. When training begins: the model is not
            patched; the optimiser lacks a tau or has a group for the taus alone; the model is
            divided otherwise than by FSDP2 or ZeRO; or a checkpoint does not fit the model.
    """

    def __init__(
        self,
        s: float | None = None,
        *,
        alpha: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        schedule: bool = False,
        orthogonality: float = 0.1,
        allocator: Mapping[str, Any] | None = None,
        target_sparsity: float | None = None,
        target_warmup: int | float | None = None,
        settle: bool | None = None,
        details: bool = False,
        history: History | None = None,
    ) -> None:
        self._numbers = tau_numbers(s, alpha=alpha, betas=betas, eps=eps)
        self._schedule = switch("schedule", schedule)
        self._gradients = Gradients(non_negative("orthogonality", orthogonality))
        self._allocation = dict(allocator or {})
        self._leading = Leading(target_sparsity, target_warmup, settle)
        self._logs = SparsityLogs(switch("details", details), history)
        self.allocator: RankAllocator | None = None
        self.sparsity_schedule: SparsitySchedule | None = None
        self._steps: TauSteps | None = None
        self._engine = Engine(None)
        self._warned = False
        self._before: dict[nn.Parameter, torch.Tensor] = {}
        self._saved: Path | None = None  # the checkpoint that has our state already

    @property
    def report(self) -> SparsityReport | None:
        """Of the last evaluation, over all processes; or None."""
        return self._logs.report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Take the taus over, from the beginning or from where a checkpoint left them."""
        self._end()
        model, optimizer = context["model"], context["optimizer"]
        patched = require_layers(model, "TokenGateCallback")
        accelerator = trainer_that_calls().accelerator
        modifications = [layer.modification for layer in patched.values()]
        adalora = [m for m in modifications if isinstance(m, AdaLoRA)]
        if not adalora:
            refuse_allocation(self._allocation)
        engine = engine_of(accelerator, optimizer, model, adalora, self._gradients.weight)
        self._engine, base = engine, engine.optimizer
        numbers = dict(self._numbers)
        if numbers["s"] is None:
            numbers["total_steps"] = state.max_steps
        if not state.global_step:
            engine.restore(self._before)
        self._before = {}
        with engine.values():
            steps = engine.kind(model, base, numbers, self._schedule)
            self._take_over(model, steps, adalora, base, state)
        steps.attach(writes=not engine.apart)
        is_ours = bool(adalora) and not isinstance(engine, Zero)
        self._gradients.attach(accelerator, model, steps.taus.values(), is_ours)
        set_unit(model, args.world_size)
        if args.eval_on_start:
            self._logs.evaluation.start(model)

    def _take_over(
        self,
        model: nn.Module,
        steps: TauSteps,
        adalora: list[AdaLoRA],
        base: torch.optim.Optimizer,
        state: TrainerState,
    ) -> None:
        """From the beginning, or from where a checkpoint or an earlier training left them."""
        saved: dict[str, Any] = state_of(base).pop(KEY, {})
        resumed = state.global_step > 0
        checkpoint = resumed_from() if resumed and self._several() else None
        if checkpoint is not None:
            saved = read_state(checkpoint) or saved
        if resumed and not saved:
            raise TokenGateError(
                f"training is resumed at step {state.global_step} from a checkpoint whose "
                "optimizer state has nothing of TokenGateCallback: resume from one that was saved "
                "with it and without save_only_model."
            )
        if resumed:
            steps.check(saved.get("patched", {}))
        if saved:
            steps.load(saved["taus"], exactly=resumed)
        self.allocator = self.sparsity_schedule = None
        self._steps = steps
        try:
            if adalora:
                self.allocator = RankAllocator(
                    model, base, total_steps=state.max_steps, **self._allocation
                )
            self.sparsity_schedule = self._leading.schedule(model, base, state.max_steps)
            parts = steps.others(self.allocator, self.sparsity_schedule)
            if resumed:
                resume(parts, saved, state.global_step)
        except BaseException:
            self._end()
            raise

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Before the first micro-batch of a step."""
        self._logs.evaluation.drop()
        self._engine.begin()
        scaler = getattr(context["optimizer"], "scaler", None)
        if scaler is not None:
            set_unit(context["model"], args.world_size, scaler)
        if will_be_logged(args, state, context.get("train_dataloader")):
            self._logs.training.start(context["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """After the last micro-batch, with gradients summed up, averaged and unscaled."""
        self._logs.training.stop()
        self._gradients.before_step(context["optimizer"], context["model"])
        if self._steps is not None:
            self._steps.seen = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """After the optimiser's step."""
        optimizer = context["optimizer"]
        skipped = getattr(optimizer, "step_was_skipped", False)
        if not skipped:
            self._engine.finish()
        if self._steps is not None and not self._steps.seen and not skipped:
            raise TokenGateError(
                f"{type(unwrapped(optimizer)).__name__} was stepped without running its hooks, so "
                "that tau never moves: train with an optimizer whose step() updates the parameters."
            )
        if skipped and self.sparsity_schedule is not None:
            self.sparsity_schedule.skip_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Evaluation comes next, if it comes."""
        schedule = self.sparsity_schedule
        if schedule is not None and state.global_step >= schedule.total_steps:
            with self._engine.values():
                schedule.end()  # as where a GradScaler skipped some
        if control.should_evaluate:
            self._logs.evaluation.start(context["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Evaluation comes next, if it comes."""
        if control.should_evaluate:
            self._logs.evaluation.start(context["model"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Add what `TokenGateTrainer` has not added before."""
        added = self.add_to(context["logs"])
        # From here, because the reporters, which come before, open their files in this event.
        self._logs.draw(state)
        if not added:
            return
        if state.log_history:
            state.log_history[-1].update(added)
        if args.report_to and not self._warned:
            self._warned = True
            _log.warning(
                "%s were told a log before TokenGateCallback could add sparsity and tau to it: "
                "use TokenGateTrainer, or report_to='none'.",
                ", ".join(args.report_to),
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """After the Trainer's checkpoint."""
        if not args.save_only_model:
            self.save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def save_state(self, checkpoint: Path) -> None:
        """Write into a checkpoint what its optimiser has no room for; all processes call it."""
        if self._steps is None or not self._several() or self._saved == checkpoint:
            return
        self._saved = checkpoint
        with self._engine.values():
            state = self._steps.state()
        write_state(checkpoint, state)

    def _several(self) -> bool:
        """Whether each process has a state of its own, or there is no room for that of one."""
        several = in_processes() and torch.distributed.get_world_size() > 1
        return several or self._engine.apart

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Another data set may be evaluated at once, while training runs."""
        self._logs.evaluation.drop()
        if self._steps is not None:
            self._logs.evaluation.start(context["model"])

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **context: Any,
    ) -> None:
        """`Trainer.predict` logs nothing: its metrics are added to here."""
        if self._logs.evaluation.runs:
            self.add_to(metrics)
        self._logs.evaluation.drop()
        self._logs.unseen = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Give the optimiser back, with the state that a later training goes on from."""
        if self._steps is not None and isinstance(self._engine, FSDP2):
            # Here, where all processes are, and not where one has failed.
            state_of(self._engine.optimizer)[KEY] = self._steps.state()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        schedule = self.sparsity_schedule
        if schedule is not None and best is not None:
            step = step_of(Path(best))
            say_if_early(schedule, step, evaluated_at(state, step))
        elif schedule is not None:
            with self._engine.values():
                schedule.end()  # of a training that is stopped early
        self.end_training(context["model"])

    def end_training(self, model: nn.Module) -> None:
        """Leave nothing behind; `TokenGateTrainer` calls it where a training is interrupted."""
        self._end()
        if tokengate.layers(model):
            tokengate.scale_penalty(model, 1)

    def before_division(self, model: nn.Module) -> None:
        """Remember what is trained; `TokenGateTrainer` calls it before others divide and round."""
        trained = [p for p in model.parameters() if p.requires_grad and not is_absent(p)]
        self._before = {p: p.detach().clone() for p in trained}

    def start_evaluation(self, model: Any) -> None:
        """Count from here to the next log of an evaluation; `TokenGateTrainer` calls it."""
        self._logs.evaluation.drop()  # of one that failed, or of what ran in between
        self._logs.evaluation.start(model)

    def add_to(self, logs: dict[str, Any]) -> dict[str, float]:
        """Add to `logs` what belongs there, once, and return that.

        Called by every process, with the same keys, if there are several.
        """
        return self._logs.add_to(logs, None if self._steps is None else self._statistics)

    def _statistics(self) -> dict[str, float]:
        """Of the taus, and AdaLoRA's distance from orthogonal maps."""
        assert self._steps is not None
        with self._engine.values():
            found = self._steps.statistics()
        distance = self._engine.distance or self._gradients.distance
        return found if distance is None else found | {"orthogonality": distance.item()}

    def _end(self) -> None:
        self._gradients.detach()
        if self._steps is not None:
            self._steps.detach()
            for part in (self.allocator, self.sparsity_schedule):
                if part is not None:
                    part.detach()
        self._engine.detach()
        self._engine = Engine(None)
        self._logs.drop()
        self._steps = self._saved = None
