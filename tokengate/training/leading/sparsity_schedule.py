"""A wanted sparsity: thresholds that follow a rising quantile of what they are compared with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.arguments import count, finite, in_our_words, share, switch
from tokengate.errors import TokenGateError, UnreachedSparsityWarning, brief
from tokengate.gates.fisher import FisherGate
from tokengate.gates.living import lead, lead_no_more, leader_of
from tokengate.gates.optimizer_steps import Arguments, is_part, once_there_are_gradients
from tokengate.gates.score_counts import no_counts, share_below
from tokengate.gates.threshold import TokenGate
from tokengate.sharding import local_part
from tokengate.training.leading.led_gates import gates_to_lead
from tokengate.training.leading.quantile_tracker import QuantileTracker
from tokengate.training.wrapped_optimizers import NO_STEP, hooked_in

# The share of a training in which the wanted sparsity rises to the target, and how far that which
# the last thresholds close may be from it without a word.
_RISE, _NEAR = 0.6, 0.03


class SparsitySchedule:
    """Leads every threshold of a model so that a wanted share of the positions is closed:

        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-4))
        schedule = tokengate.SparsitySchedule(model, optimizer, target=0.6, total_steps=1000)

    It hooks itself into `optimizer.step()`; the training loop needs no other call. The share of
    positions to be closed rises from 0 to the target on a cubic, p = target (1 - (1 - x)^3), with x
    from 0 to 1 over the first 60 % of the steps. At each step the thresholds become the quantile at
    p of the scores of the step's positions (r, or what a gate's `scores` gives), all layers
    together: which layers close is decided by their scores. Scores grow with M(x); so the quantile
    is averaged over steps in their growth and their distribution apart (`QuantileTracker`), and
    nothing closes before M(x) has grown. After the last step the thresholds stay as they are.

    Positions count as in eq. 23: those of a sample weigh 1 together, those of a layer as those of
    another; padding, and what `restrict` leaves out, does not. Counts add up exactly over
    micro-batches and ranks, and are not counted twice where activations are computed again.

    While it leads them, taus have no gradient of their own: `optimizer.step()` does not see it.
    The rule is not the paper's, which learns tau by eq. 14-22; `learn_from` goes over to it.

    Of a step's forwards those count that gradients come back through, in training mode: no
    `generate`, no reference. A step that a GradScaler skips is never seen here, so say it:
    `schedule.skip_step()`, after a `scaler.update()` that lowered the scale. Fused optimisers and
    `TokenGateCallback` do.

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
            from where they are; None for never.

    Attributes:
        steps: optimiser steps seen.

    Raises:
        TokenGateError: no layer has a gate with a threshold; something else leads them already; a
            number is out of its range. In the first step: no position was seen.
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
    ) -> None:
        self.target = finite("target", target)
        if not 0 < self.target < 1:
            raise TokenGateError(
                f"target={brief(target)} is not between 0 and 1: pass the share of positions that "
                "is to be left unmodified, e.g. 0.6."
            )
        self.total_steps = count("total_steps", total_steps)
        self._warmup = count("warmup_steps", warmup_steps, least=0)
        self._last = self.total_steps
        if learn_from is not None and learn_from != 1:
            self._last = max(1, round(share("learn_from", learn_from) * self.total_steps))
        self._learns = learn_from is not None
        self._gates = gates_to_lead(model)
        inside = next(iter(hooked_in(optimizer)), None)
        if inside is None:
            raise TokenGateError(
                f"SparsitySchedule was given {brief(optimizer)} as the optimizer: pass a "
                "torch.optim.Optimizer, or what wraps one."
            )
        self._thresholds: list[Tensor] = [g.threshold for g in self._gates.values()]  # type: ignore
        self.steps = 0
        # On one device, however many the model is on.
        self._device = self._thresholds[0].device
        layers = len(self._gates) if switch("per_layer", per_layer) else 1
        self._tracker = QuantileTracker(layers, self.total_steps, self._device)
        # How many modules a gate decides for: one, or all experts.
        self._sizes = [threshold.numel() for threshold in self._thresholds]
        self._folded = self._tracker.counts().new_zeros(sum(self._sizes))
        self._sparsity = torch.full((), torch.nan, device=self._device)
        # The thresholds in use, as log2, one for each layer or one.
        self._log_thresholds = self._tracker.counts().new_full((layers,), -torch.inf)
        for gate, threshold in zip(self._gates.values(), self._thresholds, strict=True):
            gate._seen = no_counts(threshold.device)
            lead(gate, self)
            if isinstance(gate, FisherGate):
                gate.start_feeding()
        self._found = [local_part(threshold).detach().clone() for threshold in self._thresholds]
        self._write()
        self._hook = inside.register_step_pre_hook(self._before_step)
        # Before what takes tau's gradient out of the optimiser's sight.
        hooks: Any = inside._optimizer_step_pre_hooks
        hooks.move_to_end(self._hook.id, last=False)

    @property
    def sparsity(self) -> float:
        """Sparsity in the training batch of the last step (eq. 23); NaN before the first."""
        return float(self._sparsity)

    @property
    def thresholds(self) -> dict[str, float]:
        """That of every layer, as this has set it last."""
        values = self._log_thresholds.exp2().expand(len(self._gates))
        return dict(zip(self._gates, values.tolist(), strict=True))

    @property
    def wanted(self) -> float:
        """The share that the thresholds of the next forward are to close."""
        rise = max(1.0, _RISE * (self.total_steps - self._warmup))
        x = min(1.0, max(0.0, (self.steps - self._warmup) / rise))
        return self.target * (1 - (1 - x) ** 3)

    def step(self) -> None:
        """Schedulers want this call; here `optimizer.step()` is one.

        Raises:
            TokenGateError: always.
        """
        raise TokenGateError(NO_STEP.format("SparsitySchedule"))

    def detach(self) -> None:
        """Lead no more: the thresholds stay, and taus are trained if the optimiser has them."""
        self._hook.remove()
        self._release()

    def skip_step(self) -> None:
        """Forget what was counted for a step that is not taken: it is no part of the next one."""
        for gate in self._gates.values():
            for seen in (gate._seen, getattr(gate, "_fed", None)):
                if seen is not None:
                    seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on as if it had not stopped, but for the model's."""
        return {
            "step": self.steps,
            "layers": list(self._gates),
            "folded": self._folded.clone(),
            "thresholds": self._log_thresholds.clone(),
            "tracker": self._tracker.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which `state_dict` returned for a model with the same layers.

        Raises:
            TokenGateError: it is of other layers, or of a schedule with another `per_layer`.
        """
        if list(state["layers"]) != list(self._gates):
            other = sorted({*state["layers"]} ^ {*self._gates})
            raise TokenGateError(
                "the state to load and this schedule differ in the layer "
                f"{brief(other[0] if other else state['layers'][0])}: load it into a model that is "
                "patched in the same way."
            )
        if state["thresholds"].shape != self._log_thresholds.shape:
            raise TokenGateError(
                "the state to load is of a schedule with another per_layer: make this one as that "
                "one was made."
            )
        self.steps = int(state["step"])
        self._folded.copy_(state["folded"])
        self._log_thresholds.copy_(state["thresholds"])
        self._tracker.load_state_dict(state["tracker"])
        if self.steps >= self._last:
            self._release()
        if self._learns and self.steps > self._last:  # taus have gone on by themselves
            for threshold, found in zip(self._thresholds, self._found, strict=True):
                local_part(threshold).data.copy_(found)
        else:
            self._write()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if is_part(optimizer, kwargs):
            return None
        step = self.steps

        def look() -> None:
            if self.steps == step:  # of a closure's calls the first
                self._look(optimizer)
            if not (self._learns and self.steps > self._last):
                for threshold in self._thresholds:
                    threshold.grad = None  # no optimiser touches a parameter without a gradient

        return once_there_are_gradients(args, kwargs, look)

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        # A fused optimiser is stepped by a GradScaler on infinite gradients, too.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf > 0):
            self.skip_step()
            return
        self.steps += 1
        if self.steps > self._last:
            return
        learnt = [gate for gate in self._gates.values() if isinstance(gate, TokenGate)]
        taus = [gate.tau for gate in learnt if gate.tau.requires_grad]
        skipped = any(gate.skipped for gate in self._gates.values())
        if self.steps == 1 and taus and not skipped and all(tau.grad is None for tau in taus):
            raise TokenGateError(
                f"no gradient of tau was seen in any of the {len(taus)} gates that the "
                "SparsitySchedule leads: call loss.backward() before optimizer.step(); under "
                "DeepSpeed's ZeRO, which keeps gradients to itself, train by TokenGateCallback."
            )
        seen, fed = self._collected()
        if self.steps == 1 and not bool(seen.any()):
            raise TokenGateError(
                f"SparsitySchedule saw no position in any of its {len(self._gates)} layers before "
                "the first optimizer.step(): call the model in training mode, and "
                "loss.backward(), before it."
            )
        self._fold(fed)
        counts = self._by_threshold(seen)
        self._sparsity = share_below(counts, self._log_thresholds).mean()
        self._tracker.add(counts)
        self._log_thresholds = self._tracker.quantile(self.wanted)
        self._write()
        if self.steps == self._last:
            self._warn_of_a_miss()
            self._release()

    def _collected(self) -> tuple[Tensor, list[Tensor]]:
        """What all ranks have counted and fed since the last step, by layer."""
        gates = list(self._gates.values())
        seen = torch.stack(
            [gate._seen.to(self._device) for gate in gates if gate._seen is not None]
        )
        fed = [g._fed.to(seen) for g in gates if isinstance(g, FisherGate) and g._fed is not None]
        flat = torch.cat([each.flatten() for each in fed]) if fed else seen.new_zeros(0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
            if len(flat):
                torch.distributed.all_reduce(flat)
        self.skip_step()
        parts = torch.split(flat, [each.numel() for each in fed])
        return seen, [part.view_as(each) for part, each in zip(parts, fed, strict=True)]

    def _fold(self, fed: list[Tensor]) -> None:
        told = iter(fed)
        times = torch.split(self._folded, self._sizes)
        for gate, folded in zip(self._gates.values(), times, strict=True):
            if isinstance(gate, FisherGate):
                new = next(told)
                folded += (new[..., -1] > 0).view_as(folded)
                gate.fold(new.to(gate.Q.device), folded.clamp(min=1).to(gate.Q.device))

    def _by_threshold(self, seen: Tensor) -> Tensor:
        """The counts behind each threshold, `(layers or 1, BINS)`; every module weighs alike."""
        total = seen.sum(-1, keepdim=True)
        shares = seen / torch.where(total > 0, total, 1)
        if len(self._log_thresholds) > 1:
            return shares
        return (shares * shares.new_tensor(self._sizes).unsqueeze(-1)).sum(0, keepdim=True)

    def _write(self) -> None:
        values = self._log_thresholds.exp2().expand(len(self._gates))
        with torch.no_grad():
            for threshold, value in zip(self._thresholds, values, strict=True):
                own = local_part(threshold)
                if own.numel():  # else another rank has it
                    own.copy_(value)

    def _release(self) -> None:
        # Not those that another one leads since.
        for gate in [gate for gate in self._gates.values() if leader_of(gate) is self]:
            lead_no_more(gate)
            gate.set_pace(gate.relative)
            if isinstance(gate, FisherGate):
                gate.stop_feeding()

    def _warn_of_a_miss(self) -> None:
        closed = float(share_below(self._tracker.counts(), self._tracker.relative(
            self._log_thresholds)).mean())  # fmt: skip
        if abs(closed - self.target) <= _NEAR:
            return
        warnings.warn(
            f"SparsitySchedule was to close {self.target:.0%} of the positions and ended with "
            f"{closed:.0%}.",
            UnreachedSparsityWarning,
            stacklevel=4,
        )
