"""A wanted sparsity instead of a lambda: the pull is adapted while training goes on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.arguments import count, finite, switch
from tokengate.errors import TokenGateError
from tokengate.gates.optimizer_steps import Arguments, once_there_are_gradients
from tokengate.gates.threshold import TokenGate
from tokengate.layers.patched import require_layers
from tokengate.sharding import gathered
from tokengate.training.following import followed

# Found in simulation (tests/training/test_sparsity_controller.py): how hard an error pulls, in
# units of what the loss itself pulls; how fast a lasting one adds up, up to which limit, and from
# which size on it is not yet a lasting one.
_GAIN, _RATE, _LIMIT, _LASTING = 40.0, 1.0, 3.0, 0.15
# Decay rate of the average of what the loss pulls.
_SMOOTHING = 0.9


class SparsityController:
    """Leads training to a wanted sparsity (eq. 23) and holds it there, by adapting lambda:

        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-4, total_steps=1000))
        controller = tokengate.SparsityController(model, optimizer, target_sparsity=0.6)

    It hooks itself into `optimizer.step()`; the training loop needs no other call. This is no part
    of the paper, which searches lambda by hand over four orders of magnitude.

    The rule of eq. 14-17 has an equilibrium of its own: open positions push tau up by their
    mu >= 0, closed ones down by theirs, so that even without lambda tau settles at some sparsity.
    lambda moves that balance; below it, it has to be negative, as it may become here. With e = the
    target minus the sparsity of the step's training batch, for every layer

        lambda = (40 e + sum of e over the steps near the target) |sum of mu's part| / positions

    where mu's part is what the loss adds to g (eq. 17), averaged over some ten steps: so that
    neither the loss's scale nor the batch's size matters.

    tau must be able to get there: it travels s in a step at the most (see `param_groups`). And s
    must be small against how far the ratios ||m_i|| / ||w_i|| lie apart, or the sparsity swings: in
    simulation it was off by up to 0.06 where s was a fifth of their standard deviation, and by up
    to 0.09 where it was 0.44 of it.

    Of a step's forwards those count that gradients come back through: no `generate`, no reference.
    A step that a GradScaler skips is never seen here, so say it: `controller.skip_step()`, after a
    `scaler.update()` that lowered the scale. Fused optimisers and `TokenGateCallback` do.

    Args:
        model: a patched model with gates.
        optimizer: the `torch.optim.Optimizer` that holds the taus.
        target_sparsity: the share of positions to be left unmodified, between 0 and 1.
        per_layer: True leads every layer to it; otherwise their average, between layers as the
            loss decides.
        warmup_steps: first steps of the optimiser in which tau is held where it is, so that the
            modifications are trained everywhere before any position is given up.

    Attributes:
        step: optimiser steps seen.

    Raises:
        TokenGateError: no layer has a gate whose tau is trained; the optimiser does not hold a tau;
            a number is out of its range. In the first step: no tau has a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        target_sparsity: float,
        *,
        per_layer: bool = False,
        warmup_steps: int = 0,
    ) -> None:
        self.target_sparsity = finite("target_sparsity", target_sparsity)
        if not 0 < self.target_sparsity < 1:
            raise TokenGateError(
                f"target_sparsity={target_sparsity} is not between 0 and 1: pass the share of "
                "positions that is to be left unmodified, e.g. 0.6."
            )
        switch("per_layer", per_layer)
        self._per_layer = per_layer
        self._warmup_steps = count("warmup_steps", warmup_steps, least=0)
        self._gates = _trained_gates(model, optimizer)
        self.step = 0
        gates = self._gates.values()
        taus = [gate.tau for gate in gates]
        # On one device, however many the model is on; float64 where there is, for exact counts.
        self._device = taus[0].device
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._scale = self._zeros()
        self._sum = self._zeros()
        self._sparsity = torch.full_like(self._sum, torch.nan)
        # What each gate adds and counts, shared with it until this is detached.
        self._pulls = [torch.zeros((), dtype=tau.dtype, device=tau.device) for tau in taus]
        self._tallies = [torch.zeros(4, dtype=self._dtype, device=tau.device) for tau in taus]
        for gate, pull, seen in zip(gates, self._pulls, self._tallies, strict=True):
            gate._controlled, gate._tally = pull, seen
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        # Before what takes tau's gradient out of the optimiser's sight.
        hooks: Any = optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(self._hook.id, last=False)

    @property
    def sparsity(self) -> float:
        """Sparsity in the training batch of the last step (eq. 23); NaN before the first."""
        return float(self._sparsity.nanmean())

    @property
    def penalties(self) -> dict[str, float]:
        """lambda of every layer, as it is now, or was when this was detached."""
        return {name: float(pull) for name, pull in zip(self._gates, self._pulls, strict=True)}

    def detach(self) -> None:
        """Take the hook off the optimiser; the gates have their own penalty again."""
        self._hook.remove()
        for gate in self._gates.values():
            gate._controlled = gate._tally = None

    def skip_step(self) -> None:
        """Forget what was counted for a step that is not taken: it is no part of the next one."""
        for seen in self._tallies:
            seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on as if it had not stopped."""
        return {
            "step": self.step,
            "scale": dict(zip(self._gates, self._scale.tolist(), strict=True)),
            "sum": dict(zip(self._gates, self._sum.tolist(), strict=True)),
            "penalty": self.penalties,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which `state_dict` returned for a model with the same layers.

        Raises:
            TokenGateError: it is of other layers, or has a number that is not finite.
        """
        for part in ("scale", "sum", "penalty"):
            if set(state[part]) != set(self._gates):
                other = sorted(set(state[part]) ^ set(self._gates))[0]
                raise TokenGateError(
                    f"the state to load and this controller differ in the layer {other!r}: load it "
                    "into a model that is patched in the same way."
                )
            for name, number in state[part].items():
                if not math.isfinite(number):
                    raise TokenGateError(
                        f"the state to load has {part}={number} for {name!r}, from a training "
                        "whose loss was not finite: go on from an earlier checkpoint."
                    )
        self.step = state["step"]
        self._scale = self._tensor([state["scale"][name] for name in self._gates])
        self._sum = self._tensor([state["sum"][name] for name in self._gates])
        for name, pull in zip(self._gates, self._pulls, strict=True):
            pull.fill_(state["penalty"][name])

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        step = self.step

        def look() -> None:
            if self.step == step:  # of a closure's calls the first
                self._look(optimizer)

        return once_there_are_gradients(args, kwargs, look)

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        gates = self._gates.values()
        tallies = torch.stack([seen.to(self._device) for seen in self._tallies])
        self.skip_step()
        # A fused optimiser is stepped by a GradScaler on scaled gradients, and on infinite ones.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf > 0):
            return
        loss_scale = getattr(optimizer, "grad_scale", None)
        unseen = [gate for gate in gates if gate.tau.grad is None and not gate.skipped]
        if self.step == 0 and len(unseen) == len(gates):
            raise TokenGateError(
                f"no gradient of tau was seen in any of the {len(gates)} gates that the "
                "SparsityController leads: call loss.backward() before optimizer.step(); under "
                "DeepSpeed's ZeRO, which keeps gradients to itself, train by TokenGateCallback."
            )
        gradients = self._gradients() / (1.0 if loss_scale is None else loss_scale)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(tallies)
        self.step += 1
        samples, shares, positions, closed = tallies.unbind(1)
        self._sparsity = shares / samples  # NaN where a layer was not called
        pulled = self._tensor([pull.to(self._device) for pull in self._pulls])
        # g without lambda's part, for each position.
        drive = (-gradients - pulled * (positions - closed)).abs() / positions.clamp(min=1)
        # What is not finite, and was skipped, tells nothing of the loss.
        told = (samples > 0) & drive.isfinite()
        self._scale = torch.where(told, self._averaged(drive), self._scale)
        if self.step <= self._warmup_steps:
            for gate in gates:
                gate.tau.grad = None  # no optimiser touches a parameter without a gradient
            return
        error = self.target_sparsity - (
            self._sparsity if self._per_layer else self._sparsity.nanmean().expand_as(self._sum)
        )
        error = error.nan_to_num()
        lasting = torch.where(error.abs() < _LASTING, _RATE * error, 0.0)
        self._sum = (self._sum + lasting).clamp(-_LIMIT, _LIMIT)
        wanted = (_GAIN * error + self._sum).clamp(-_GAIN, _GAIN) * self._scale
        for pull, value in zip(self._pulls, wanted, strict=True):
            pull.copy_(value)

    def _averaged(self, drive: Tensor) -> Tensor:
        # From its first value on, as Adam's averages are after their correction.
        weight = (1 - _SMOOTHING) / (1 - _SMOOTHING**self.step)
        return self._scale + weight * (drive - self._scale)

    def _gradients(self) -> Tensor:
        """dL/dtau of every layer, `(layers,)`; 0 where there is none, NaN where it was skipped."""
        found = []
        for gate in self._gates.values():
            gradient = gate.tau.grad
            if gradient is None:
                nothing = torch.nan if gate.skipped else 0.0
                found.append(torch.full((), nothing, dtype=self._dtype, device=self._device))
            else:
                whole = gathered(gradient).detach()
                found.append(whole.reshape(()).to(self._device, self._dtype))
        return torch.stack(found)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._gates), dtype=self._dtype, device=self._device)

    def _tensor(self, values: list[Any]) -> Tensor:
        if isinstance(values[0], Tensor):
            return torch.stack(values).to(self._dtype)
        return torch.tensor(values, dtype=self._dtype, device=self._device)


def _trained_gates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, TokenGate]:
    gates = {
        name: layer.gate
        for name, layer in require_layers(model, "SparsityController").items()
        if isinstance(layer.gate, TokenGate) and layer.gate.tau.requires_grad
    }
    if not gates:
        raise TokenGateError(
            f"SparsityController was asked of a {type(model).__name__} none of whose layers has a "
            "gate with a tau that is trained: patch it with gate='threshold'."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held |= followed(optimizer)
    for name, gate in gates.items():
        if id(gate.tau) not in held:
            raise TokenGateError(
                f"the optimizer does not hold tau of {name!r}: make it from "
                "tokengate.param_groups(model, ...), or pass the one that has the taus, or that "
                "tokengate.follow was called for."
            )
        if gate._controlled is not None:
            raise TokenGateError(
                f"{name!r} has a SparsityController already: call its detach() first (that of an "
                "interrupted Trainer's callback is callback.controller)."
            )
    return gates
