"""A wanted sparsity: thresholds that follow a rising quantile of what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokengate.arguments import count, in_our_words, share, switch, wanted_sparsity
from tokengate.errors import TokenGateError, brief
from tokengate.gates.score_counts import mean_of_counted, share_below, shares_of
from tokengate.layers.patched import require_layers
from tokengate.training.leading.last_calls import STEPS, LastCalls
from tokengate.training.leading.led_gates import (
    LedGates,
    check_first_step,
    check_state,
    gates_to_lead,
    refuse_unlearnt,
)
from tokengate.training.leading.moves import Moves
from tokengate.training.leading.optimizer_hook import OptimizerHook
from tokengate.training.leading.quantile_tracker import QuantileTracker
from tokengate.training.leading.settling import settled
from tokengate.training.leading.unreached import LastSteps, say_if_early, say_if_missed
from tokengate.training.wrapped_optimizers import NO_STEP, hooked_in

# The share of a training in which the wanted sparsity rises to the target.
_RISE = 0.6


class SparsitySchedule:
    """Leads every threshold of a model so that a wanted share of the positions is closed:

        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-4))
        schedule = tokengate.SparsitySchedule(model, optimizer, target=0.6, total_steps=1000)

    It hooks itself into `optimizer.step()`; the training loop needs no other call. The share of
    positions to be closed rises from 0 to the target on a cubic, p = target (1 - (1 - x)^3), with x
    from 0 to 1 over the first 60 % of the steps. At each step the thresholds become the quantile at
    p of the scores of the step's positions (r, or what a gate's `scores` gives), all layers
    together: which layers close is decided by their scores. Scores grow with M(x), in each layer as
    they do; so their growth and their distribution are averaged over steps, layer by layer and
    apart (`QuantileTracker`), and nothing closes before M(x) has grown. Thresholds that were
    trained, loaded or calibrated stay so until the first step, and the share goes on from what they
    close, up or down to the target; with one threshold for all from 0 if a layer is new, whose
    small M(x) that of the others would close for good. After the last step the thresholds are set
    once more, and stay: the model is called again, in evaluation, with what it was called with in
    the last 8 to 128 steps, of which copies are kept meanwhile, and in checkpoints (512 samples, or
    64 MiB), and tells what closes the target; up to four times, as what one layer closes changes
    what others see.

    Positions count as in eq. 23: those of a sample weigh 1 together, those of a layer as those of
    another; padding, and what `restrict` leaves out, does not. Counts add up exactly over
    micro-batches and ranks, and are not counted twice where activations are computed again.

    While it leads them, taus have no gradient of their own: `optimizer.step()` does not see it.
    The rule is not the paper's, which learns tau by eq. 14-22; `learn_from` goes over to it.

    Scores are counted without the method's dropout, as they will be evaluated. Of a step's forwards
    those count that gradients may come back through: no `generate`, no reference. A step that a
    GradScaler skips is never seen here, so say it, after a `scaler.update()` that lowered the
    scale: `schedule.skip_step()`, and `schedule.end()` when training is over. Fused optimisers do
    the former, the callbacks of the Trainer and of Lightning both.

    Args:
        model: a patched model with gates that have a threshold: `"threshold"`, `"firm"`,
            `"fisher"`, or of one's own.
        optimizer: that trains the modifications.
        target: the share of positions to be left unmodified, between 0 and 1.
        total_steps: optimiser steps of the whole training.
        per_layer: True leads every layer to the target; otherwise all layers have one threshold,
            and the target is that of all together.
        warmup_steps: first steps, after which the share begins to rise.
        learn_from: the share of the steps, in (0, 1], after which the taus are learned by eq. 14-22
            from where they are; None for never. Only of gates that train their threshold.
        settle: False for thresholds that stay as they were followed, so that the model is not
            called. They do also where that would tell less: where calls were made by a function
            that is compiled, took other things than plain tensors, or 256 MiB of them, were within
            a `use` that has ended, or a `restrict` by a function, or with another forward, as
            Lightning's of several devices; and where they are few, or change in the course of the
            training and what was followed is nearer in the end.

    Raises:
        TokenGateError: no layer has a gate with a threshold; something else leads them already;
            they compare different things, and are not led `per_layer`; a number is out of its
            range; `learn_from` of gates that do not learn. In the first step: no position was seen.
    """

    @in_our_words({"sparsity": "target", "target_sparsity": "target"})
    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        target: float,
        total_steps: int,
        *,
        per_layer: bool = False,
        warmup_steps: int = 0,
        learn_from: float | None = None,
        settle: bool = True,
    ) -> None:
        self.target = wanted_sparsity("target", target)
        self._total_steps = count("total_steps", total_steps)
        self._warmup = count("warmup_steps", warmup_steps, least=0)
        self._rise = max(1.0, _RISE * (self.total_steps - self._warmup))
        self._last = self.total_steps
        if learn_from is not None and learn_from != 1:
            self._last = max(1, round(share("learn_from", learn_from) * self.total_steps))
        if self._warmup >= self._last:
            handed = "" if learn_from is None else f" and learn_from={learn_from}"
            raise TokenGateError(
                f"warmup_steps={warmup_steps} was given for total_steps={total_steps}{handed}, so "
                "that it would never close anything: pass fewer."
            )
        self._planned = self._last
        self._learns = learn_from is not None
        self._settles = switch("settle", settle) and not self._learns
        patched = require_layers(model, "SparsitySchedule")
        self._per_layer = switch("per_layer", per_layer)
        gates = gates_to_lead(model, patched, together=not self.per_layer)
        self._model, self._patched = model, {name: patched[name] for name in gates}
        if learn_from is not None:
            refuse_unlearnt(gates, learn_from)
        inside = next(iter(hooked_in(optimizer)), None)
        if inside is None:
            raise TokenGateError(
                f"SparsitySchedule was given {brief(optimizer)} as the optimizer: pass a "
                "torch.optim.Optimizer, or what wraps one."
            )
        self._led = LedGates(gates)
        self._moves = Moves(self._patched.values(), self._led.device)
        weights = None if self.per_layer else self._led.weights
        self._tracker = QuantileTracker(len(gates), self._led.device, weights)
        self._recent = LastSteps(self._last, self._warmup + self._rise, self._led.device)
        self._sparsity = torch.full((), torch.nan, device=self._led.device)
        # The thresholds in use, as log2, one for each layer or one.
        self._log_thresholds = torch.full_like(self._tracker.quantile(0), -torch.inf)
        # The share that is closed before the first step.
        self._start = 0.0
        self._continues = any(self._led.are_set)
        self._led.begin(self)
        if not self._continues:
            self._led.write(self._log_thresholds)
        self._calls = LastCalls(model, self._led.device)
        self._hook = OptimizerHook(inside, self, gates.values())
        self._keep_calls()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training; for others make a new one, and load this state."""
        return self._total_steps

    @property
    def per_layer(self) -> bool:
        """Whether every layer is led to the target."""
        return self._per_layer

    @property
    def steps(self) -> int:
        """Optimiser steps seen, also after its end."""
        return self._hook.steps

    @property
    def sparsity(self) -> float:
        """Sparsity in the training batch of the last step (eq. 23); NaN before the first."""
        return float(self._sparsity)

    @property
    def thresholds(self) -> dict[str, float]:
        """That of every layer, as this has set it last."""
        values = self._log_thresholds.exp2().expand(len(self._led.by_name))
        return dict(zip(self._led.by_name, values.tolist(), strict=True))

    @property
    def wanted(self) -> float:
        """The share that the thresholds of the next forward are to close."""
        return self.wanted_at(self.steps)

    def wanted_at(self, step: int) -> float:
        """The same after `step` optimiser steps."""
        x = min(1.0, max(0.0, (step - self._warmup) / self._rise))
        return self._start + (self.target - self._start) * (1 - (1 - x) ** 3)

    def step(self) -> None:
        """Schedulers want this call; here `optimizer.step()` is one.

        Raises:
            TokenGateError: always.
        """
        raise TokenGateError(NO_STEP.format("SparsitySchedule"))

    def detach(self) -> None:
        """Lead no more: the thresholds stay, and taus are trained if the optimiser has them."""
        self._end()
        self._hook.unhook()

    def end(self) -> None:
        """The training is over, if less than `total_steps` were taken, as where some were skipped.

        What follows the last step is done now, if the share that was wanted is the target by then;
        else a warning says what it was.
        """
        if self.steps < self._warmup + self._rise:
            say_if_early(self)
        elif not self._learns:
            self._last = min(self._last, self.steps)
            with torch.no_grad():
                self._settle()

    def skip_step(self) -> None:
        """Forget what was counted for a step that is not taken: it is no part of the next one."""
        self._led.forget()
        self._calls.forget()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on as if it had not stopped, but for the model's."""
        return {
            "step": self.steps,
            "start": self._start,
            "layers": list(self._led.by_name),
            "led": self._led.state_dict(),
            "thresholds": self._log_thresholds.clone(),
            "tracker": self._tracker.state_dict(),
            "calls": self._calls.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which `state_dict` returned for a model with the same layers.

        Raises:
            TokenGateError: it is of other layers, of a schedule with another `per_layer`, or of an
                earlier version; or this one is detached, has ended and another leads its gates, or
                these were taken out of the model.
        """
        check_state(state, self._led.by_name, self._log_thresholds)
        self._hook.check_hooked()
        self._led.check_present(self._model)
        if self._hook.schedule is None:  # it has ended
            gates = gates_to_lead(self._model, self._patched, together=not self.per_layer)
            if int(state["step"]) < self._planned:  # a training that goes back
                self._led.begin(self)
                self._hook.begin(self, gates.values())
                self._last = self._planned
        self._hook.steps, self._start = int(state["step"]), float(state["start"])
        self._led.load_state_dict(state["led"])
        self._log_thresholds.copy_(state["thresholds"])
        self._tracker.load_state_dict(state["tracker"])
        if self._settles and "calls" in state:  # not in one of an earlier version
            self._calls.load_state_dict(state["calls"])
        self._keep_calls()
        if self.steps >= self._last:
            self._end()
        if self._learns and self.steps > self._last:  # taus have gone on by themselves
            self._led.restore()
        elif self.steps or not self._continues:
            self._led.write(self._log_thresholds)
        else:
            self._led.restore()

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        if self.steps > self._last:  # the last one was begun, and failed
            return
        seen, fed = self._led.collected()
        if self.steps == 1:
            check_first_step(optimizer, self._patched.values(), seen)
        if fed:
            self._led.fold(fed)
        each = shares_of(seen) if self.per_layer else self._led.weighed(seen)
        counts = each if self.per_layer else each.sum(0, keepdim=True)
        self._sparsity = mean_of_counted(share_below(counts, self._log_thresholds), counts)
        wanted = self.wanted_at(self.steps - 1)
        if self.steps == 1 and self._continues:
            self._sparsity = self._led.closed(seen)
            fresh = not self.per_layer and self._led.any_is_new(seen)
            self._start = wanted = 0.0 if fresh else float(self._sparsity)
        self._recent.add(self.steps, self._sparsity - wanted, counts.sum())
        self._tracker.add(each, wanted, self._moves.of(optimizer))
        self._log_thresholds = self._tracker.quantile(self.wanted)
        self._led.write(self._log_thresholds)
        self._calls.step()
        self._keep_calls()
        if self.steps == self._last:
            self._hook.after_this_step(optimizer)

    def _keep_calls(self) -> None:
        """From where on the last ones may be among the steps that are left."""
        leads = self._hook.schedule is not None
        if leads and self._settles and self._last - STEPS <= self.steps < self._last:
            self._calls.begin()

    def _settle(self) -> None:
        if self._hook.schedule is None:  # it has ended
            return
        again, now = self._calls.again(), self._log_thresholds.exp2()
        self._end()  # also where what follows is interrupted
        found = settled(self._model, self._patched, again, self.target, now, self._lead_to)
        if found is None:
            told = float(self._tracker.share_below(self._log_thresholds))
            say_if_missed(self, self._recent.closed(told, self.target), 0.0)
        else:
            say_if_missed(self, found.closed, 2 * found.error)

    def _lead_to(self, thresholds: Tensor) -> None:
        self._log_thresholds = thresholds.log2()
        self._led.write(self._log_thresholds)

    def _end(self) -> None:
        self._calls.end()
        self._led.end(self)
        self._hook.end(self._last, holds=not self._learns)
