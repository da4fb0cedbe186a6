"""Taus that move by their own rule, whatever optimiser trains everything else, and however.

At its step their gradients are taken out of its sight, and an Adam of their own (eq. 18-22) takes
one, too: neither its rule reaches them, nor schedulers, nor weight decay.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tokengate.errors import TokenGateError, UnreachedLayerWarning, brief
from tokengate.gates.living import any_led, tau_of
from tokengate.gates.optimizer_steps import Arguments, is_infinite, once_there_are_gradients
from tokengate.layers.patched import require_layers
from tokengate.training.hooked import Hooked
from tokengate.training.param_groups import slope, tau_rule
from tokengate.training.wrapped_optimizers import (
    Follower,
    WithZeroGrad,
    holders,
    hooked_in,
    loss_scale,
    make_readable,
)

# A key of the state in an optimiser's `state_dict`, beside its parameters: torch loads such keys
# as they are. Of taus that the optimiser does not hold; those of others are in its own `state`.
KEY = "tokengate.taus"
# All that follow an optimiser.
_ALL: WeakSet[Following] = WeakSet()


def follow(
    model: nn.Module,
    optimizer: Any,
    s: float | None = None,
    *,
    total_steps: int | None = None,
    alpha: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
) -> Following:
    """Move the taus of `model` by eq. 18-22 at each step of an optimiser of any kind:

        optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1)[:1], momentum=0.9)
        tokengate.follow(model, optimizer, total_steps=1000)

    The training loop needs no other call. The optimiser may hold the taus or not. If it does, their
    gradients are hidden from its steps, and there again after each; its `state` has theirs, as it
    would be under Adam. If it does not, as in the example, nothing that goes by its groups sees
    them, as Lightning's `gradient_clip_val`; its `zero_grad` zeroes theirs, too, a step uses them
    up, a GradScaler that calls that step is divided out, and its `state_dict` has their state.

    Schedulers, weight decay, closures (of several calls the first counts), schedule-free modes and
    steps within backward leave tau alone; a step that a GradScaler skips moves it as little as
    anything else. Before or after `load_state_dict`, and before or after schedulers are made, is
    the same. Of two calls for the same taus the later one counts.

    Args:
        model: a patched model; without a trained tau nothing happens.
        optimizer: a `torch.optim.Optimizer`, or what wraps one. One that wraps another and computes
            itself (SAM, Lookahead, `ScheduleFreeWrapper`) may not hold the taus.
        s: slope of eq. 11; the farthest tau moves in one step, at alpha = 1. Without it and
            `total_steps`, what `param_groups` was last asked for, or else 4e-5.
        total_steps: instead of `s`, as in `param_groups`.
        alpha: learning rate of eq. 22, which multiplies s.
        betas: Adam's decay rates for tau.
        eps: of eq. 22.

    Raises:
        TokenGateError: a number is out of its range; `optimizer` is none; one that wraps another
            holds a tau. Loading: the state has nothing of taus that the optimiser does not hold.
    """
    gates = {name: layer.gate for name, layer in require_layers(model, "follow").items()}
    taus = {name: tau for name, g in gates.items() if g and (tau := tau_of(g)) is not None}
    known = {gate.s for gate in gates.values() if gate is not None} - {None}
    relative = None if s is None and total_steps is None else total_steps is not None
    s = slope(known.pop() if relative is None and len(known) == 1 else s, total_steps)
    following = Following(taus, optimizer, tau_rule(s, alpha, betas, eps))
    for gate in gates.values():
        if gate is not None:
            gate.s = s
            if relative is not None:
                gate.set_pace(relative and tau_of(gate) is not None)
    return following


class Following(Hooked):
    """What `follow` returns.

    Attributes:
        taus: what is moved, by the layer's name.
        adam: the `torch.optim.Adam` that moves them, for a scheduler of their own; None if there
            are none.
        begun: how many steps of the optimiser began.
    """

    def __init__(self, taus: dict[str, nn.Parameter], optimizer: Any, rule: dict[str, Any]) -> None:
        self.taus = taus
        self.begun = 0
        self._optimizers = list(hooked_in(optimizer))
        if not self._optimizers:
            raise TokenGateError(
                f"follow was given {brief(optimizer)} as the optimizer: pass a "
                "torch.optim.Optimizer, or what wraps one."
            )
        self._holders = holders(taus, optimizer, self._optimizers)
        make_readable(self._holders)
        self._free = [tau for tau in taus.values() if tau not in self._holders]
        # What moves each tau in the step that is taken, and what is its `grad` after it.
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._hidden: dict[nn.Parameter, Tensor] = {}
        # In steps within backward: taus' values before, and gradients of earlier micro-batches.
        self._values: dict[nn.Parameter, Tensor] = {}
        self._summed: dict[nn.Parameter, Tensor] = {}
        self._moved = not taus  # or this was said
        # What is being loaded.
        self._found: dict[str, Any] | None = None
        self.adam: torch.optim.Adam | None = None
        if taus:
            # All at once: on a CPU torch would step one after the other, in twice the time.
            self.adam = Follower([{"params": list(taus.values()), **rule}], foreach=True)
        self._hooks: list[Any] = []
        for other in list(_ALL):
            if {*map(id, other.taus.values())} & {*map(id, taus.values())}:
                other.detach()
                self._go_on_from(other)
        _ALL.add(self)
        for each in self._optimizers:
            self._attach(each)

    def detach(self) -> None:
        """Follow no more; the optimiser keeps the state of the taus that it holds."""
        self.unhook()
        _ALL.discard(self)

    def state_dict(self) -> dict[str, Any]:
        """Adam's state of every tau, by the layer's name.

        It is in the optimiser's own `state_dict`, too: this is for optimisers that write one in
        which it is not, and for going on with another.
        """
        return {name: dict(self._state(tau)) for name, tau in self.taus.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            TokenGateError: it is of other layers; or this one is detached.
        """
        self.check_hooked()
        if not isinstance(state, dict) or state.keys() != self.taus.keys():
            found = set(state) if isinstance(state, dict) else set()
            other = min(map(str, found ^ self.taus.keys()), default="")
            raise TokenGateError(
                f"the state to load and the taus that are followed differ in {other!r}: patch the "
                "model as it was patched when it was saved."
            )
        for name, tau in self.taus.items():
            own = self._state(tau)
            own.clear()
            own |= {k: v.to(v if k == "step" else tau, copy=True) for k, v in state[name].items()}

    def _attach(self, optimizer: Optimizer) -> None:
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if not self._free:
            return
        self._hooks += [
            optimizer.register_state_dict_post_hook(self._write),
            optimizer.register_load_state_dict_pre_hook(self._read),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        self._hooks.append(WithZeroGrad(optimizer, self._forget))
        state: dict[Any, Any] = optimizer.state
        if KEY in state:  # loaded before
            self.load_state_dict(state.pop(KEY))

    def _go_on_from(self, other: Following) -> None:
        """With the averages of the same taus, if it is the same optimiser."""
        if other._optimizers == self._optimizers:
            for tau in self._free:
                if other.adam is not None and other.adam.state.get(tau):
                    self._state(tau).update(other.adam.state[tau])

    def _forget(self) -> None:
        """Somebody zeroes the gradients of what the optimiser holds."""
        for tau in self._free:
            tau.grad = None

    # Left out of graphs: what is hidden changes from step to step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        self.begun += 1
        one = kwargs.get("param")
        if one is not None:
            self._before_one(one)
            return None
        calls = 0

        def take() -> None:
            nonlocal calls
            calls += 1
            self._take(first=calls == 1)

        return once_there_are_gradients(args, kwargs, take, before=self._put_back)

    def _take(self, first: bool) -> None:
        for tau in self.taus.values():
            if tau.grad is None:
                continue
            if first or tau not in self._gradients:
                # A copy, because the next call of a closure may write into it.
                self._gradients[tau] = tau.grad.clone()
            self._hidden[tau], tau.grad = tau.grad, None

    def _put_back(self) -> None:
        for tau, gradient in self._hidden.items():
            tau.grad = gradient
        self._hidden = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if (one := kwargs.get("param")) is not None:
            self._after_one(optimizer, one)
            return
        # A step that calls its parent class's, or another optimiser's, is announced twice.
        gradients, self._gradients = self._gradients, {}
        if gradients and not is_infinite(optimizer):
            # A fused optimiser is stepped by a GradScaler on scaled gradients.
            self._move(gradients, getattr(optimizer, "grad_scale", None))
        self._say_if_none(optimizer, gradients)
        self._put_back()
        if gradients:
            self._forget()  # used up: there may be nobody else who zeroes them

    def _before_one(self, parameter: nn.Parameter) -> None:
        """Within backward the optimiser steps one parameter alone, and tau if it is told to."""
        if any(parameter is tau for tau in self.taus.values()) and parameter.grad is not None:
            self._gradients[parameter] = parameter.grad.clone()
            self._values[parameter] = parameter.detach().clone()

    def _after_one(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        gradient = self._gradients.pop(parameter, None)
        if gradient is None:
            return
        parameter.copy_(self._values.pop(parameter))
        gradient += self._summed.pop(parameter, 0.0)
        if getattr(optimizer, "optimizer_accumulation", False):  # micro-batches are still to come
            self._summed[parameter] = gradient
        else:
            self._move({parameter: gradient}, None)

    def _move(self, gradients: dict[nn.Parameter, Tensor], scale: Any) -> None:
        assert self.adam is not None
        own = loss_scale() if self._free else None
        for tau, gradient in gradients.items():
            by = scale if tau in self._holders else own
            by = by.to(gradient.device) if isinstance(by, Tensor) else by
            tau.grad = gradient if by is None else gradient / by
            state = self.adam.state[tau] = self._state(tau)
            if "exp_avg_sq" not in state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tau), torch.zeros_like(tau)
        self.adam.step()
        for tau in gradients:
            tau.grad = None

    def _state(self, tau: nn.Parameter) -> dict[str, Any]:
        """Of a tau that an optimiser holds, there: it saves and loads it as that of any other."""
        assert self.adam is not None
        state: dict[str, Any] = self._holders.get(tau, self.adam).state[tau]
        return state

    def _say_if_none(self, optimizer: Optimizer, gradients: dict[nn.Parameter, Tensor]) -> None:
        # Led ones have no gradients.
        self._moved = self._moved or bool(gradients) or any_led(self.taus.values())
        if self._moved:
            return
        held = (p for group in optimizer.param_groups for p in group["params"])
        if any(p.grad is not None for p in held):
            self._moved = True
            warnings.warn(
                f"in a step of {type(optimizer).__name__} none of the {len(self.taus)} taus that "
                "follow it had a gradient, so that none was moved: train with what keeps gradients "
                "in `grad`, which DeepSpeed's ZeRO and FSDP1 do not.",
                UnreachedLayerWarning,
                stacklevel=4,
            )

    def _write(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        state["state"][KEY] = self.state_dict()

    def _read(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        own = dict(state["state"])
        self._found = own.pop(KEY, None)
        if self._found is None and own:
            raise TokenGateError(
                f"the state to load has nothing of the taus that {type(optimizer).__name__} does "
                "not hold, so it was saved without tokengate.follow: load it first and call follow "
                "then, which starts their averages anew."
            )
        return {**state, "state": own}

    def _load(self, optimizer: Optimizer) -> None:
        found, self._found = self._found, None
        if found is not None:
            self.load_state_dict(found)


def followed(optimizer: Optimizer) -> set[int]:
    """The ids of the taus that something moves in a hook of this optimiser's step."""
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks", {}).values()
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    owners += [each for each in list(_ALL) if optimizer is each.adam]
    return {id(tau) for owner in owners for tau in getattr(owner, "taus", {}).values()}
