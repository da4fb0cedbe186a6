"""The gradients that a Trainer clips: without the taus', and with AdaLoRA's penalty in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from tokengate.integrations.trainer.surroundings import unwrapped
from tokengate.sharding import gathered
from tokengate.training.orthogonality import add_penalty


class Gradients:
    """Between the last micro-batch of a step and the step.

    Args:
        weight: of AdaLoRA's penalty.

    Attributes:
        weight: of the penalty.
        distance: from orthogonality at the last step, or None.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._wanted = False
        self._penalised = False
        self._clipping = contextlib.ExitStack()
        self.distance: Tensor | None = None

    def attach(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        taus: Iterable[nn.Parameter],
        penalised: bool,
    ) -> None:
        """Let the Trainer's own clipping leave the taus out, and see the penalty's gradient.

        On the accelerator, which is one Trainer's: the arguments may be another training's too,
        also after this one was interrupted, and are never changed. What else somebody clips by it
        is clipped as asked.
        """
        self._wanted = penalised and self.weight > 0
        plain, own = accelerator.clip_grad_norm_, vars(accelerator).get("clip_grad_norm_")
        apart = {id(tau) for tau in taus}

        def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            asked = [parameters] if isinstance(parameters, Tensor) else parameters
            others = [p for p in asked if id(p) not in apart]
            if not self._wanted or self._penalised:
                return plain(others, max_norm, norm_type)
            accelerator.unscale_gradients()
            self._add_penalty(model)
            # Of what is divided, each process has but its part of the norm.
            return gathered(nn.utils.clip_grad_norm_(others, max_norm, norm_type))

        accelerator.clip_grad_norm_ = clip  # type: ignore[method-assign]
        if own is None:
            self._clipping.callback(delattr, accelerator, "clip_grad_norm_")
        else:  # somebody else's, which goes on when this is over
            self._clipping.callback(setattr, accelerator, "clip_grad_norm_", own)

    def before_step(self, optimizer: Any, model: nn.Module) -> None:
        """With gradients that are summed up, averaged and, where they were clipped, unscaled."""
        if self._wanted and not self._penalised:  # nothing was clipped
            scaler = getattr(optimizer, "scaler", None)
            if scaler is not None:
                with contextlib.suppress(RuntimeError):  # unscaled by somebody else
                    scaler.unscale_(unwrapped(optimizer))
            self._add_penalty(model)
        self._penalised = False

    def detach(self) -> None:
        """The accelerator clips as before."""
        self._clipping.close()
        self._penalised = False

    def _add_penalty(self, model: nn.Module) -> None:
        """To gradients that are summed up, averaged and unscaled."""
        self.distance, self._penalised = add_penalty(model, self.weight), True
