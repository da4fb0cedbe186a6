"""The taus of a model whose optimiser somebody else made, moved by an Adam of their own."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

import tokengate
from tokengate import TokenGate, TokenGateError
from tokengate.gates.optimizer_steps import is_infinite
from tokengate.gates.registry import with_defaults
from tokengate.integrations.live_logging import tau_scalars
from tokengate.sharding import divided_as, gathered, is_sharded, numbers_here
from tokengate.training.following import followed

# A key of the optimiser's own `state`, beside its parameters: torch saves and loads such keys as
# they are, so that what stands there is in each checkpoint's optimizer.pt and nowhere else.
KEY = "tokengate"


class TauSteps:
    """Moves the taus whenever the optimiser that holds them takes a step, in its place.

    Attributes:
        takes_sharded: whether they may be divided over processes.
    """

    takes_sharded = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        numbers: dict[str, Any],
        schedule: bool,
    ) -> None:
        gates = [layer.gate for layer in tokengate.layers(model).values()]
        self.taus = trained_taus(model)
        self._patched = how_patched(model)
        self._gates = [gate for gate in gates if gate is not None]
        self._optimizer = optimizer
        self.seen = True
        self._taken: dict[nn.Parameter, Tensor] = {}
        self._values: dict[nn.Parameter, Tensor] = {}
        self._parts: dict[str, Any] = {}
        self._hooks: list[Any] = []
        self._group = self._holder(numbers)
        self._adam: torch.optim.Adam | None = None
        if self.taus:
            group = tokengate.param_groups(model, lr=0.0, **numbers)[-1]
            self._lr = group["lr"]
            # All at once: on a CPU torch would step one tau after the other, in twice the time.
            self._adam = torch.optim.Adam([group], foreach=True)
            if schedule and not self._group.get("initial_lr"):
                raise TokenGateError(
                    "schedule=True was asked with a scheduler that keeps no initial_lr above 0 in "
                    "the optimizer's groups: drop it, or use another lr_scheduler_type."
                )
        self._schedule = schedule

    def others(self, allocator: Any, sparsity_schedule: Any) -> dict[str, Any]:
        """What else has a state in the checkpoint, by its key there."""
        parts = {"allocator": allocator, "sparsity_schedule": sparsity_schedule}
        self._parts = {name: part for name, part in parts.items() if part is not None}
        return self._parts

    def attach(self, writes: bool = True) -> None:
        """From the optimiser's next step on; `writes` its state into the optimiser's."""
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._writes = writes
        if writes:
            self._hooks.append(self._optimizer.register_state_dict_pre_hook(self._write))

    def detach(self) -> None:
        """No more, with the state left to the optimiser that a later training goes on from."""
        if self._hooks and self._writes:
            self._write(self._optimizer)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def statistics(self) -> dict[str, float]:
        """Where the taus are, with one transfer from their device."""
        if not self.taus:
            return {}
        return tau_scalars(numbers_here(self.taus.values()), self._gates)

    def check(self, saved: dict[str, str]) -> None:
        """An error if the model of a checkpoint was patched otherwise; such of before say nothing.

        Its parameters may be as many, of which the Trainer loads those that fit.
        """
        for name in sorted(saved.keys() | self._patched.keys()) if saved else ():
            there, here = (each.get(name, "not patched") for each in (saved, self._patched))
            if there != here:
                raise TokenGateError(
                    f"{name!r} is {there} in the checkpoint and {here} in the model: patch the "
                    "model as it was patched when the checkpoint was saved."
                )

    def load(self, saved: dict[str, dict[str, Tensor]], exactly: bool) -> None:
        """Go on from what `_write` left; `exactly` where the model was loaded with it."""
        for name in sorted(saved.keys() | self.taus.keys()):
            if name not in saved or name not in self.taus:
                where = "the checkpoint" if name in saved else "the model"
                raise TokenGateError(
                    f"{where} alone has a trainable tau in {name!r}: patch the model as it was "
                    "patched when the checkpoint was saved."
                )
        for name, tau in self.taus.items():
            state = dict(saved[name])
            value, found = state.pop("tau").to(tau.device), gathered(tau.detach())
            if exactly and not torch.equal(value, found):
                raise TokenGateError(
                    f"tau of {name!r} is {found.item():g} in the model and {value.item():g} in the "
                    "checkpoint's optimizer state: let the Trainer load model and optimizer from "
                    "one checkpoint, into a model patched as it was."
                )
            if self._adam is not None and state:
                step = state.pop("step").clone()
                moments = {
                    k: divided_as(v.to(tau.device, copy=True), tau) for k, v in state.items()
                }
                self._adam.state[tau] = {"step": step, **moments}

    def _holder(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """The optimiser's group that the taus are in, or the first of these."""
        own = {id(tau) for tau in self.taus.values()}
        for hook in getattr(self._optimizer, "_optimizer_step_pre_hooks", {}).values():
            if isinstance(getattr(hook, "__self__", None), TauSteps):
                raise TokenGateError(
                    "the Trainer has two TokenGateCallbacks, which would both move the taus: pass "
                    "one."
                )
        if not own.isdisjoint(followed(self._optimizer)):
            raise TokenGateError(
                "the Trainer was given an optimizer that tokengate.follow was called for, and "
                "TokenGateCallback moves the taus itself: leave follow out, and give the optimizer "
                "all that is trained."
            )
        groups = [{id(p) for p in group["params"]} for group in self._optimizer.param_groups]
        held = set().union(*groups)
        for name, tau in self.taus.items():
            # DTensors are told by what they have, so that their import is not paid for.
            if id(tau) not in held or (is_sharded(tau) and not self.takes_sharded):
                state = "divided" if id(tau) in held else "not held by the Trainer's optimizer"
                raise TokenGateError(
                    f"tau of {name!r} is {state}: patch the model before the optimizer is made, "
                    "and use no tensor parallelism."
                )
        for group, ids in zip(self._optimizer.param_groups, groups, strict=True):
            if ids and ids <= own and len(held) > len(own):
                raise TokenGateError(
                    f"the Trainer was given an optimizer with a group of taus alone, at learning "
                    f"rate {float(group['lr']):g}, and TokenGateCallback moves the taus itself: "
                    "make it from the model's parameters, or leave it to the Trainer."
                )
        pairs = zip(self._optimizer.param_groups, groups, strict=True)
        return next((group for group, ids in pairs if ids & own), {})

    def _before_step(self, *_: Any) -> None:
        self.seen = True
        # A step that calls its parent class's is announced twice.
        taken = {tau: tau.grad for tau in self.taus.values() if tau.grad is not None}
        if not taken or self._adam is None:
            return
        if not is_infinite(self._optimizer):
            if self._schedule:
                now = float(self._group["lr"]) / float(self._group["initial_lr"])
                self._adam.param_groups[0]["lr"] = self._lr * now
            # A fused optimiser is stepped by a GradScaler on scaled gradients.
            scale = getattr(self._optimizer, "grad_scale", None)
            if scale is not None:
                for tau, gradient in taken.items():
                    tau.grad = gradient / scale.to(gradient.device)
            self._adam.step()
        self._taken = taken
        for tau in taken:
            tau.grad = None

    def _after_step(self, *_: Any) -> None:
        # For whoever looks at gradients after the step.
        for tau, gradient in self._taken.items():
            tau.grad = gradient
        self._taken = {}

    def state(self) -> dict[str, Any]:
        """All that a resumed training goes on from; of what is divided, every process calls it."""
        taus = {}
        for name, tau in self.taus.items():
            state = self._adam.state[tau] if self._adam is not None else {}
            taus[name] = {"tau": gathered(tau.detach()).clone()}
            taus[name] |= {k: gathered(v) for k, v in state.items()}
        state = {"taus": taus, "patched": self._patched}
        return state | {name: part.state_dict() for name, part in self._parts.items()}

    def _write(self, optimizer: torch.optim.Optimizer) -> None:
        state_of(optimizer)[KEY] = self.state()


def how_patched(model: nn.Module) -> dict[str, str]:
    """Each layer's method and options, but dropout, which may change; no objects of a user's.

    As they act, by whatever they were given: a scale for an alpha, an 8 for an 8.0.
    """
    found = {}
    for name, layer in tokengate.layers(model).items():
        modification = layer.modification
        options = with_defaults(type(modification), modification.options)
        if hasattr(modification, "scale"):
            options |= {"scale": modification.scale, "alpha": None, "rslora": None}
        shown = [
            f"{option}={float(value):g}" if isinstance(value, Real) else f"{option}={value!r}"
            for option, value in options.items()
            if option != "dropout" and isinstance(value, (Real, str))
        ]
        found[name] = f"{type(modification).__name__}({', '.join(shown)})"
    return found


def trained_taus(model: nn.Module) -> dict[str, nn.Parameter]:
    """The taus that have the paper's rule, by the name of their layer."""
    gates = {name: layer.gate for name, layer in tokengate.layers(model).items()}
    return {
        name: gate.tau
        for name, gate in gates.items()
        if isinstance(gate, TokenGate) and gate.tau.requires_grad
    }


def state_of(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """Its `state`, whose type says that it has parameters for keys alone."""
    return optimizer.state
