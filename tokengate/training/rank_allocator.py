"""AdaLoRA's budget: which singular values of which layers are kept, while training goes on."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tokengate.arguments import count, share
from tokengate.errors import TokenGateError
from tokengate.gates.optimizer_steps import Arguments, is_infinite, once_there_are_gradients
from tokengate.sharding import divided_as, gathered
from tokengate.training.hooked import Hooked
from tokengate.training.importance import Importance
from tokengate.training.orthogonality import adalora_layers
from tokengate.training.wrapped_optimizers import NO_STEP

# Whose rank an allocator lowers.
LED: WeakSet[nn.Module] = WeakSet()


class RankAllocator(Hooked):
    """Lowers the ranks of all AdaLoRA layers together, from `rank` to `target_rank` on average:

        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-4))
        allocator = tokengate.RankAllocator(model, optimizer, total_steps=len(loader))

    It hooks itself into `optimizer.step()`; the training loop needs no other call. Source: Zhang et
    al., 2023 (arXiv 2303.10512), eq. 7-12 and Algorithm 1. At step t, counted from 1, for T =
    `total_steps`, t_i = `initial_warmup` and t_f = `final_warmup`:

        sensitivity  I = |p dL/dp|                 of every entry p of P, E and Q
        smoothed     I' = beta1 I' + (1 - beta1) I
        uncertainty  U' = beta2 U' + (1 - beta2) |I - I'|
        score of a triplet = s(E_i) + mean of s(P_:i) + mean of s(Q_i:),   s = I' U'
        budget       b = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3,  rounded down

    and the b triplets with the highest scores over all layers keep their singular value; the
    others' is set to 0. That happens at every `interval`-th step with t_i < t < T - t_f, and
    finally, by the scores of the step before, at t = T - t_f; from there on what is pruned is set
    to 0 after every step. In between
    two allocations a pruned singular value may grow again, as in the paper, so that it can come
    back.

    Gradients are read before the step, because an optimiser may rewrite them; they are multiplied
    with the values after it, as the authors' code and Hugging Face PEFT do (the paper's
    Algorithm 1 takes both before it): a pruned E, which is 0 before the step, could not come back
    otherwise. Of equal scores the earlier triplet is kept, so that the budget is met exactly.
    A GradScaler's skipped steps do not count, and its factor is divided out; elsewhere, an entry
    whose gradient is not finite has no sensitivity in that step.

    Args:
        model: a model patched with `method="adalora"`.
        optimizer: any `torch.optim.Optimizer` that holds the factors of all its AdaLoRA layers.
        total_steps: optimiser steps of the whole training, T.
        initial_warmup: steps before the first allocation, t_i; a tenth of T by default.
        final_warmup: steps after the last one, t_f; three tenths of T by default.
        interval: steps between allocations.
        beta1: decay rate of the sensitivity.
        beta2: decay rate of the uncertainty.

    Attributes:
        steps: optimiser steps seen.
        masks: for every layer a boolean tensor `(rank,)`, of experts `(E, rank)`: which singular
            values are kept.

    Raises:
        TokenGateError: no AdaLoRA layer; a number out of its range; warm-ups that leave no step for
            allocation; a factor that is frozen or that the optimiser does not hold. While training:
            a step, or a layer before its first allocation, without a gradient of E. (P and Q have
            one from `orthogonality` even where the layer is never called.)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        initial_warmup: int | None = None,
        final_warmup: int | None = None,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        self._modifications = adalora_layers(model, "RankAllocator")
        total = count("total_steps", total_steps)
        first = total // 10 if initial_warmup is None else initial_warmup
        last = 3 * total // 10 if final_warmup is None else final_warmup
        self._schedule: dict[str, float] = {
            "total_steps": total,
            "initial_warmup": count("initial_warmup", first, least=0),
            "final_warmup": count("final_warmup", last, least=0),
            "interval": count("interval", interval),
            "beta1": share("beta1", beta1),
            "beta2": share("beta2", beta2),
        }
        # Of experts each has its own.
        targets = sum(m.target_rank * m.E.numel() // m.rank for m in self._modifications.values())
        self._schedule["final_budget"] = targets
        self._first, self._last = first, total - last
        if self._first >= self._last or self._last < 2:
            raise TokenGateError(
                f"total_steps={total} leaves no step between initial_warmup={first} and "
                f"final_warmup={last}, whose gradients could tell what to prune: pass more steps "
                "or shorter warm-ups."
            )
        self._importance = Importance(
            self._modifications, self._schedule["beta1"], self._schedule["beta2"]
        )
        self._check_optimizer(optimizer)
        LED.update(self._modifications.values())
        self.steps = 0
        self.masks = {
            name: torch.ones(m.E.shape, dtype=torch.bool, device=m.E.device)
            for name, m in self._modifications.items()
        }
        self._skipped = self._pending = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def step(self) -> None:
        """Schedulers want this call; here `optimizer.step()` is one.

        Raises:
            TokenGateError: always.
        """
        raise TokenGateError(NO_STEP.format("RankAllocator"))

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer: how many of its singular values, or its experts', are kept."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    @property
    def budget(self) -> int:
        """Singular values that the schedule allows over all layers, after the steps seen."""
        initial = sum(m.E.numel() for m in self._modifications.values())
        final = int(self._schedule["final_budget"])
        if self.steps <= self._first:
            return initial
        if self.steps >= self._last:
            return final
        left = 1 - (self.steps - self._first) / (self._last - self._first)
        return int((initial - final) * left**3 + final)

    def detach(self) -> None:
        """Take the hooks off the optimiser: no further step changes anything here."""
        self.unhook()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: save it beside the optimiser's own state.

        The same on one process and, called by all, on many: nothing in it is sharded.
        """

        def whole(layers: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
            return {n: {f: gathered(t) for f, t in own.items()} for n, own in layers.items()}

        state = {
            "step": self.steps,
            "schedule": self._schedule,
            "masks": self.masks,
            "sensitivity": whole(self._importance.sensitivity),
            "uncertainty": whole(self._importance.uncertainty),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; the model's own values are not touched.

        Raises:
            TokenGateError: it was taken from other layers, ranks or another schedule; or this
                one is detached.
        """
        self.check_hooked()
        for key in ("masks", "schedule", "sensitivity", "step", "uncertainty"):
            kind = int if key == "step" else dict
            if not isinstance(state, dict) or not isinstance(state.get(key), kind):
                raise TokenGateError(
                    f"the state has no {key!r}: pass what RankAllocator.state_dict() returned."
                )
        if state["schedule"] != self._schedule:
            raise TokenGateError(
                f"the state's schedule is {state['schedule']} and this allocator's "
                f"{self._schedule}: construct it with the same numbers."
            )
        found = {name: mask.shape[-1] for name, mask in state["masks"].items()}
        wanted = {name: m.rank for name, m in self._modifications.items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise TokenGateError(
                    f"layer {name!r} has rank {found.get(name, 'none')} in the state and "
                    f"{wanted.get(name, 'none')} in the model: patch it as it was patched then."
                )
        for what in ("sensitivity", "uncertainty"):
            for name, tensors in state[what].items():
                for factor, parameter in self._importance.factors(name).items():
                    if getattr(tensors.get(factor), "shape", None) != parameter.shape:
                        raise TokenGateError(
                            f"the state's {what} of {factor} in {name!r} does not have the shape "
                            f"{tuple(parameter.shape)}: patch it as it was patched then."
                        )

        def own(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            factors = self._importance.factors(name)
            copies = {k: t.to(factors[k].device, copy=True) for k, t in tensors.items()}
            return {k: divided_as(t, factors[k]) for k, t in copies.items()}

        self.steps = int(state["step"])
        self.masks = {
            name: mask.to(self.masks[name].device, copy=True)
            for name, mask in state["masks"].items()
        }
        self._importance.sensitivity = {n: own(n, t) for n, t in state["sensitivity"].items()}
        self._importance.uncertainty = {n: own(n, t) for n, t in state["uncertainty"].items()}

    def __repr__(self) -> str:
        return (
            f"RankAllocator(steps={self.steps}, budget={self.budget}, "
            f"layers={len(self.masks)}, target_step={self._last})"
        )

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TokenGateError(
                f"RankAllocator was given a {type(optimizer).__name__} as its optimizer: pass a "
                "torch.optim.Optimizer."
            )
        own = set(self._modifications.values())
        for hook in getattr(optimizer, "_optimizer_step_post_hooks", {}).values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, RankAllocator) and own & set(other._modifications.values()):
                raise TokenGateError(
                    "this optimizer has a RankAllocator for these layers already: go on with that "
                    "one, or detach() it first."
                )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name in self._modifications:
            for factor, parameter in self._importance.factors(name).items():
                if not parameter.requires_grad or id(parameter) not in held:
                    state = "not held by the optimizer" if parameter.requires_grad else "frozen"
                    raise TokenGateError(
                        f"{factor} of the AdaLoRA layer {name!r} is {state}, so its importance is "
                        "never seen: make the optimizer from tokengate.param_groups(model, lr)."
                    )

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        self._pending = True
        return once_there_are_gradients(args, kwargs, lambda: self._read_gradients(optimizer))

    def _read_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        self._skipped = is_infinite(optimizer)
        step = self.steps + 1
        if self._skipped or step > self._last:
            return
        # A fused optimiser is stepped by a GradScaler on scaled gradients.
        reached = self._importance.read(getattr(optimizer, "grad_scale", None))
        if not reached:
            raise TokenGateError(
                f"no gradient was seen at step {step} in any of the {len(self.masks)} AdaLoRA "
                "layers: call loss.backward() before optimizer.step(), zero_grad() not between "
                "them, and detach() this allocator where the model was unpatched."
            )
        never = self._modifications.keys() - self._importance.sensitivity.keys() - reached
        if never and self._allocates_at(step):
            raise TokenGateError(
                f"the AdaLoRA layer {min(never)!r} has had no gradient in {step} steps and would "
                "be pruned unseen: exclude it from targets=, or lengthen initial_warmup."
            )

    def _allocates_at(self, step: int) -> bool:
        between = self._first < step < self._last and step % self._schedule["interval"] == 0
        return between or step == self._last

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        # A step that calls its parent class's is announced twice.
        if self._skipped or not self._pending:
            return
        self._pending = False
        self.steps += 1
        if self.steps < self._last:
            self._importance.update()
        allocates = self._allocates_at(self.steps)
        if allocates:
            self._allocate()
        if allocates or self.steps > self._last:
            for name, modification in self._modifications.items():
                E = modification.E
                E.masked_fill_(divided_as(~self.masks[name], E), 0.0)
        if self.steps >= self._last:
            self._importance.sensitivity, self._importance.uncertainty = {}, {}

    def _allocate(self) -> None:
        first = next(iter(self.masks.values())).device
        found = [self._importance.scores(name).to(first) for name in self.masks]
        scores = torch.cat([of_layer.flatten() for of_layer in found])
        best = scores.argsort(descending=True, stable=True)[: self.budget]
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[best] = True
        parts = torch.split(kept, [mask.numel() for mask in self.masks.values()])
        for (name, mask), part in zip(self.masks.items(), parts, strict=True):
            self.masks[name] = part.view(mask.shape).to(mask.device, copy=True)
