"""Taus in an optimiser whose parameters FSDP2 has divided."""

from __future__ import annotations

from typing import Any

import torch

from tokengate.integrations.trainer.tau_steps import TauSteps


class ShardedTauSteps(TauSteps):
    """Its optimiser has a state for every parameter, and nothing of ours, as its checkpoints want.

    FSDP2's checkpoints ask for the state of each parameter that the optimiser holds, by name. So
    it steps the taus as well, with gradients of 0, and what it makes of them is taken back.
    """

    takes_sharded = True

    def _before_step(self, *_: Any) -> None:
        if self._values:  # a step that calls its parent class's is announced twice
            return
        super()._before_step()
        for tau in self.taus.values():
            self._values[tau] = tau.detach().clone()
            tau.grad = torch.zeros_like(tau)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for tau, value in self._values.items():
            tau.copy_(value)
            tau.grad = None
        self._values = {}
        super()._after_step()
