"""DeepSpeed's ZeRO: gradients are taken where they come about, values written where it keeps them.

It averages, clips and steps within `backward`, on flat pieces that are nobody's parameters. So the
gradients of what has a rule of its own are taken in backward, summed up and averaged here. The
taus' are then zero for ZeRO: no norm has them in it, and what its optimiser makes of such a
parameter is written over after each step. Nothing of this asks which stage it is, but for where
the values are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tokengate
from tokengate.methods.adalora import AdaLoRA
from tokengate.training.orthogonality import penalty_gradients


class ZeroStep(torch.optim.Optimizer):
    """Stands for ZeRO's optimiser: it holds taus and AdaLoRA's factors as the parameters they are.

    Who hooks its `step` finds there what a step of one process finds: gradients that are averaged,
    without a loss scale, and clipped, but for the taus'; and values, which may be written.

    Args:
        engine: DeepSpeed's, which trains `model`.
        model: a patched model.
        taus: what is moved by those who hook the step, and by nobody else.
        adalora: the modifications whose gradients are wanted; theirs ZeRO keeps as well.
        weight: of their penalty.
    """

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        taus: Sequence[nn.Parameter],
        adalora: Sequence[AdaLoRA],
        weight: float,
    ) -> None:
        # The taus, and what they are, whatever ZeRO's optimiser makes of them.
        self._taus: dict[nn.Parameter, Tensor | None] = dict.fromkeys(taus)
        self._factors = [p for m in adalora for p in (m.P, m.Q)]
        # In the model's order, which is that of all processes.
        self._written = [*taus, *(m.E for m in adalora)]
        super().__init__([{"params": [*self._written, *self._factors]}], {})
        self._engine, self._model, self._weight = engine, model, weight
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._penalties: dict[nn.Parameter, Tensor] = {}
        self.distance: Tensor | None = None
        self.scale = 1.0
        self._hooks = [p.register_hook(self._taker(p)) for p in self.param_groups[0]["params"]]

    def detach(self) -> None:
        """No more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sums, self._penalties = [], {}, {}

    def begin(self) -> None:
        """Before a step's first forward."""
        scale = float(self._engine.optimizer.loss_scale)
        if scale != self.scale:
            world = torch.distributed.get_world_size()
            tokengate.scale_penalty(self._model, world * scale)
            self.scale = scale
        if self._factors and self._weight:
            with self._gathered(self._factors):
                self.distance, self._penalties = penalty_gradients(self._model, self._weight)
        self._sums = {}  # also what was taken of the penalty itself

    def finish(self) -> None:
        """After ZeRO's step: announce it to those who hooked this one, on every process alike."""
        # As the Trainer's scheduler left it, for those who follow it.
        theirs = self._engine.optimizer.param_groups[0]
        self.param_groups[0] |= {k: theirs[k] for k in ("lr", "initial_lr") if k in theirs}
        gradients = self._averaged()
        with self.values():
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            try:
                self.step()
            finally:
                for parameter in gradients:
                    parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """ZeRO has taken its own, and who hooked this takes theirs."""

    @contextlib.contextmanager
    def values(self) -> Iterator[None]:
        """With all the values in place; what is written to taus and to E is kept.

        Every process must do the same with them.
        """
        with self._gathered(self._factors), self._writing(self._written):
            for tau, value in self._taus.items():
                if value is not None:
                    tau.data.copy_(value)
            yield
            self._taus = {tau: tau.detach().clone() for tau in self._taus}

    def restore(self, values: dict[nn.Parameter, Tensor]) -> None:
        """Give trained parameters these values, which DeepSpeed has rounded to 16 bits."""
        with self._writing(list(values)):
            for parameter, value in values.items():
                parameter.data.copy_(value)

    @contextlib.contextmanager
    def _writing(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with self._gathered(parameters, 0):  # whose values the other processes are sent
            yield
        for parameter in parameters:
            if hasattr(parameter, "ds_tensor"):
                safe_set_local_fp32_param(parameter, parameter.ds_tensor.detach().float())
            else:
                safe_set_full_fp32_param(parameter, parameter.detach().float())

    def _gathered(self, parameters: list[nn.Parameter], writer: int | None = None) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=writer, enabled=bool(parameters)
        )

    def _taker(self, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
        def take(gradient: Tensor) -> Tensor:
            penalty = self._penalties.pop(parameter, None)
            if penalty is not None:  # once a step
                gradient = gradient + (self.scale * penalty).to(gradient)
            taken = gradient.detach().float()
            known = self._sums.get(parameter)
            self._sums[parameter] = taken.clone() if known is None else known.add_(taken)
            return torch.zeros_like(gradient) if parameter in self._taus else gradient

        return take

    @torch.no_grad()
    def _averaged(self) -> dict[nn.Parameter, Tensor | None]:
        """Of every parameter, None where no process had one; with one message."""
        held: list[nn.Parameter] = self.param_groups[0]["params"]
        sizes = [getattr(p, "ds_numel", p.numel()) for p in held]
        parts = [self._sums.pop(p, None) for p in held]
        device = self._engine.device
        flat = [
            torch.zeros(size, device=device) if part is None else part.flatten()
            for part, size in zip(parts, sizes, strict=True)
        ]
        seen = torch.tensor([float(part is not None) for part in parts], device=device)
        summed = torch.cat([*flat, seen])
        torch.distributed.all_reduce(summed)
        *found, seen = summed.split([*sizes, len(held)])
        unit = 1 / (torch.distributed.get_world_size() * self.scale)
        clipped = unit * self._clipping()
        averaged: dict[nn.Parameter, Tensor | None] = {}
        for parameter, gradient, count in zip(held, found, seen.tolist(), strict=True):
            gradient *= unit if parameter in self._taus else clipped
            shape = getattr(parameter, "ds_shape", parameter.shape)
            averaged[parameter] = gradient.reshape(shape) if count else None
        return averaged

    def _clipping(self) -> float:
        """By how much ZeRO has made gradients smaller in this step."""
        most, norm = self._engine.gradient_clipping(), self._engine.get_global_grad_norm()
        if not most or norm is None:
            return 1.0
        return min(1.0, most / (float(norm) + 1e-6))
