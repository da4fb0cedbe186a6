"""Everything that training a gate wants, as a callback of Lightning's Trainer.

    from tokengate.integrations.lightning_callback import TokenGateCallback

    trainer = lightning.Trainer(callbacks=[TokenGateCallback()], gradient_clip_val=1.0)

Of `lightning` and of `pytorch_lightning`, in automatic and in manual optimisation.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

import tokengate
from tokengate import RankAllocator, SparsityReport, SparsitySchedule, TokenGateError
from tokengate.arguments import non_negative
from tokengate.integrations.callbacks import (
    Leading,
    refuse_allocation,
    resume,
    tau_numbers,
)
from tokengate.integrations.live_logging import report_of, tau_scalars
from tokengate.layers.patched import require_layers
from tokengate.methods.adalora import AdaLoRA
from tokengate.sharding import numbers_here
from tokengate.training.following import Following
from tokengate.training.leading.unreached import say_if_replaced
from tokengate.training.orthogonality import add_penalty
from tokengate.training.scale_penalty import set_unit

# Where a tau is no parameter of its own, or its gradient no average over processes.
_REFUSED = {"DeepSpeedStrategy", "FSDPStrategy", "XLAStrategy", "XLAFSDPStrategy"}
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[Any, ...]:
    """The `Callback` of the package that is in use, or of both if neither is yet."""
    used = [name for name in _PACKAGES if name in sys.modules]
    roots = [name for name in _PACKAGES if importlib.util.find_spec(name.partition(".")[0])]
    return tuple(importlib.import_module(name).Callback for name in used or roots)


class TokenGateCallback(*_bases()):  # type: ignore[misc]
    """Trains the gates of a patched model in a LightningModule.

    - tau moves by eq. 18-22 whatever optimiser, scheduler or `StochasticWeightAveraging` the others
      are trained with: `tokengate.follow` of the optimiser that holds the modifications.
    - tau's gradient is no part of what `gradient_clip_val` and `self.clip_gradients` clip. An own
      `configure_gradient_clipping` leaves it out with `tokengate.clip_grad_norm_`.
    - lambda has its unit on several devices, under `accumulate_grad_batches` and in `16-mixed`,
      whose skipped steps leave everything as it was.
    - AdaLoRA layers get a `RankAllocator` and the gradient of their penalty, which is added once a
      step, before clipping: leave it out of the loss.
    - At each step that is logged `sparsity`, `tau_mean`, `tau_min` and `tau_max` are, and
      `val_sparsity` after each validation: eq. 23 over all processes.
    - Allocator and schedule are in the checkpoint, the taus' Adam is in the optimiser's part of
      it: a run that is resumed ends as one that was never stopped.

    Args:
        s: slope of eq. 11, the farthest tau moves in one step; None for what `param_groups` was
            asked for, or else what it chooses for as many `total_steps` as the Trainer takes.
        alpha: learning rate of eq. 22, which multiplies s.
        betas: Adam's decay rates for tau.
        eps: of eq. 22.
        orthogonality: weight of AdaLoRA's penalty; 0 leaves it to the loss.
        allocator: options of the `RankAllocator`; `total_steps` is the Trainer's otherwise.
        target_sparsity: the sparsity to which a `tokengate.SparsitySchedule` leads all gates over
            the steps of the training, whatever the numbers of tau's own rule.
        target_warmup: with `target_sparsity`, steps before the share of closed positions begins to
            rise, 0 by default: an int for their number, a float in [0, 1) for their share of all.
        settle: with `target_sparsity`, False for last thresholds as they were followed, so that the
            model is not called again for them; see the schedule. True by default.

    Attributes:
        following: what moves the taus, from the beginning of the training on; or None.
        allocator: the `RankAllocator`, likewise.
        sparsity_schedule: the `SparsitySchedule`, likewise.

    Raises:
        TokenGateError: a number is out of its range. When training begins: the module has no
            patched layer; the strategy is DeepSpeed, FSDP1 or XLA; no optimiser holds a
            modification; a checkpoint was saved without this callback, or does not fit.
    """

    def __init__(
        self,
        s: float | None = None,
        *,
        alpha: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        orthogonality: float = 0.1,
        allocator: Mapping[str, Any] | None = None,
        target_sparsity: float | None = None,
        target_warmup: int | float | None = None,
        settle: bool | None = None,
    ) -> None:
        super().__init__()
        self._numbers = tau_numbers(s, alpha=alpha, betas=betas, eps=eps)
        self._orthogonality = non_negative("orthogonality", orthogonality)
        self._allocation = dict(allocator or {})
        self._leading = Leading(target_sparsity, target_warmup, settle)
        self.following: Following | None = None
        self.allocator: RankAllocator | None = None
        self.sparsity_schedule: SparsitySchedule | None = None
        self._optimizer: Any = None
        self._loaded: dict[str, Any] = {}
        self._within = contextlib.ExitStack()  # what ends with the training
        self._recording = contextlib.ExitStack()
        self._recorder: Any = None
        self._stepped: int | None = None

    # What is kept.

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint has of allocator and schedule."""
        parts = {"allocator": self.allocator, "sparsity_schedule": self.sparsity_schedule}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the training begins, which makes what it is loaded into."""
        self._loaded = state_dict

    # From the beginning of a training to its end.

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimisers are made, and loaded."""
        self._end(pl_module)
        patched = require_layers(pl_module, "TokenGateCallback")
        refused = _REFUSED & {kind.__name__ for kind in type(trainer.strategy).__mro__}
        if refused:
            raise TokenGateError(
                f"the model is trained under {min(refused)}, where a tau is no parameter of its "
                "own: use DDP, or ModelParallelStrategy with fully_shard."
            )
        self._optimizer = _holder(trainer.optimizers, patched.values())
        steps = trainer.estimated_stepping_batches
        self._within.callback(self._leave, pl_module)
        try:
            self._make(pl_module, None if math.isinf(steps) else int(steps))
            self._resume(trainer.global_step)
        except BaseException:
            self._end(pl_module)
            raise
        self._within.enter_context(self._clipping(trainer.precision_plugin))
        _set_unit(trainer, pl_module)

    def _make(self, model: nn.Module, steps: int | None) -> None:
        patched = tokengate.layers(model).values()
        numbers: dict[str, Any] = dict(self._numbers)
        asked = any(layer.gate is not None and layer.gate.s is not None for layer in patched)
        if numbers["s"] is None and not asked:
            numbers["total_steps"] = steps
        self.following = tokengate.follow(model, self._optimizer, **numbers)
        self.allocator = self.sparsity_schedule = None
        if any(isinstance(layer.modification, AdaLoRA) for layer in patched):
            options = {"total_steps": steps, **self._allocation}
            self.allocator = RankAllocator(model, self._optimizer, **options)
        else:
            refuse_allocation(self._allocation)
        self.sparsity_schedule = self._leading.schedule(model, self._optimizer, steps)

    def _resume(self, step: int) -> None:
        loaded, self._loaded = self._loaded, {}
        if step:
            parts = {"allocator": self.allocator, "sparsity_schedule": self.sparsity_schedule}
            resume({n: p for n, p in parts.items() if p is not None}, loaded, step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The taus go on following their optimiser, whose state has theirs when it is saved."""
        if self.sparsity_schedule is not None:
            self.sparsity_schedule.end()  # of a training that is stopped early
        self._end(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """What averages weights has put its own in by now, whichever callback came first."""
        say_if_replaced(self.sparsity_schedule, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As at the end."""
        self._end(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """As at the end."""
        self._end(pl_module)

    def _end(self, model: nn.Module) -> None:
        self._recording.close()
        self._recorder = self._stepped = None
        self._within.close()

    def _leave(self, model: nn.Module) -> None:
        for part in (self.allocator, self.sparsity_schedule):
            if part is not None:
                part.detach()
        if tokengate.layers(model):
            tokengate.scale_penalty(model, 1)

    # Each step.

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before a micro-batch."""
        if _scaler(trainer) is not None:
            _set_unit(trainer, pl_module)
        if trainer._logger_connector.should_update_logs and self._recorder is None:
            self._record(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """With gradients that are summed up, averaged and unscaled, before they are clipped."""
        self._recording.close()
        if getattr(optimizer, "_optimizer", optimizer) is not self._optimizer:
            return
        if self.allocator is not None and self._orthogonality:
            add_penalty(pl_module, self._orthogonality * _still_scaled_by(trainer, optimizer))
        self._stepped = None if self.sparsity_schedule is None else self.sparsity_schedule.steps

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step, if one was taken."""
        stepped, self._stepped = self._stepped, None
        schedule, loop = self.sparsity_schedule, trainer.fit_loop
        if schedule is not None and stepped == schedule.steps:
            schedule.skip_step()  # as a GradScaler did
        if loop._should_accumulate():
            return
        # Lightning counts this batch only after.
        if schedule and loop.epoch_loop._batches_that_stepped + 1 >= schedule.total_steps:
            schedule.end()  # if some were skipped
        if self._recorder is None or not trainer._logger_connector.should_update_logs:
            return
        report = self._report()
        if report is not None and self.following is not None:
            gates = [layer.gate for layer in tokengate.layers(pl_module).values() if layer.gate]
            taus = numbers_here(self.following.taus.values())
            pl_module.log_dict({"sparsity": report.sparsity, **tau_scalars(taus, gates)})

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from here on."""
        if tokengate.layers(pl_module) and not trainer.sanity_checking:
            self._record(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what was counted."""
        report = self._report()
        if report is not None:
            pl_module.log("val_sparsity", report.sparsity)

    def _record(self, model: nn.Module) -> None:
        self._recording.close()
        self._recorder = self._recording.enter_context(tokengate.record(model))

    def _report(self) -> SparsityReport | None:
        """Of what was recorded, once."""
        self._recording.close()
        recorder, self._recorder = self._recorder, None
        return report_of(recorder)

    @contextlib.contextmanager
    def _clipping(self, precision: Any) -> Iterator[None]:
        """Within, what Lightning clips is all but the taus."""
        plain, own = precision.clip_gradients, vars(precision).get("clip_gradients")

        def clip(*args: Any, **kwargs: Any) -> Any:
            taus = [] if self.following is None else [*self.following.taus.values()]
            gradients = [tau.grad for tau in taus]
            for tau in taus:
                tau.grad = None
            try:
                return plain(*args, **kwargs)
            finally:
                for tau, gradient in zip(taus, gradients, strict=True):
                    tau.grad = gradient

        precision.clip_gradients = clip
        try:
            yield
        finally:
            del precision.clip_gradients
            if own is not None:
                precision.clip_gradients = own


def _holder(optimizers: list[Any], patched: Any) -> Any:
    """The optimiser that holds a modification."""
    own = {id(p) for layer in patched for p in layer.modification.parameters()}
    for optimizer in optimizers:
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    raise TokenGateError(
        "none of the optimizers that configure_optimizers returned holds a parameter of a "
        "modification: make one from tokengate.param_groups(self, lr), or from self.parameters()."
    )


def _scaler(trainer: Any) -> Any:
    """The GradScaler of `16-mixed`."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _set_unit(trainer: Any, model: nn.Module) -> None:
    # Replicas, over which gradients are averaged: under tensor parallelism fewer than processes.
    sampling = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    set_unit(model, float(sampling.get("num_replicas", 1)), _scaler(trainer))


def _still_scaled_by(trainer: Any, optimizer: Any) -> float:
    """What a fused optimiser divides its gradients by in its step."""
    scaler = _scaler(trainer)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0
