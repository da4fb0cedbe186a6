"""A gate that asks how much the loss would change, to first order, if a position were closed."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokengate.arguments import count
from tokengate.errors import TokenGateError
from tokengate.gates.base import LedGate
from tokengate.gates.positions import Positions
from tokengate.gates.registry import register_gate
from tokengate.kernels.precision import without_autocast
from tokengate.kernels.recomputation import is_trial

# Decay rate of Q's average over optimiser steps.
_DECAY = 0.9


@register_gate("fisher")
class FisherGate(LedGate):
    """a_i = S_i = [s_i >= T], s_i = sqrt(z_i' Q z_i), with Q an average of g g', g = dL/dz_i.

    z is the input in the method's low-rank space and g its gradient as if a_i were 1 (for LoRA
    z = A x and g = scale B' dL/dh). If position i were closed, the loss would change by mu_i =
    <g_i, z_i> to first order; s_i^2 is the mean of its square over the gradients that there are, by
    which it is known before backward. So s has one unit in all layers, and one T is for all of
    them, where r = ||m|| / ||w|| says nothing of which layers matter.

    Q is `(rank, rank)`, averaged over the real positions of a step, open or closed, in a unit in
    which E[||g||^2] of all its layers together is what it was before (at first 1 on average), and
    with 0.9 over steps, corrected for its start. It is fed by backward, while a `SparsitySchedule`
    leads the gate, which averages it over ranks; then it stays. It is saved with the adapter. While
    it is 0, as M(x) is at first, nothing is closed.

    Of methods without factors (a `forward` of one's own) s_i is r_i rms(mu) / rms(r), and Q is
    `(1, 1)`: the same unit, without telling positions apart otherwise than r does.

    Not of the gate's paper, and no part of it is learned by eq. 14-22.

    Args:
        linear: the layer that is gated.
        rank: of z; `patch` knows it. None where the method has no factors.

    Raises:
        TokenGateError: `rank` is no number > 0, or not that of the method.
    """

    T: Tensor
    Q: Tensor
    _counts: ClassVar[tuple[str, ...]] = (*LedGate._counts, "_fed")
    # What backward adds up over a step, for `fold` to average: of the numerator of Q's average,
    # flat, and of its denominator.
    _fed: Tensor | None = None

    def __init__(self, linear: nn.Linear, *, rank: int | None = None) -> None:
        super().__init__(linear)
        self.rank = None if rank is None else count("rank", rank)
        size = self.rank or 1
        self.new_threshold("T")
        self.register_buffer("Q", torch.zeros(size, size, dtype=self._dtype, device=self._device))

    @property
    def threshold(self) -> Tensor:
        """T."""
        return self.T

    def weights(self, positions: Positions) -> Tensor:
        """a, `(...)`, as booleans; a NaN leaves the gate open."""
        if self._fed is not None and torch.is_grad_enabled() and not is_trial():
            r = None
            if self.rank is None:
                with torch.no_grad():
                    r = positions.r
            positions.learn(partial(self._feed, positions.mask, r))
        return ~(self.scores(positions) < self.T)

    def scores(self, positions: Positions) -> Tensor:
        """s, `(...)`."""
        z = positions.z
        if self.rank is None:
            return super().scores(positions) * self.Q.sqrt().reshape(())
        if z is None or z.shape[-1] != self.rank:
            found = "none" if z is None else f"one of {z.shape[-1]}"
            raise TokenGateError(
                f"rank={self.rank} was given to a FisherGate, and the method has {found}: leave "
                "rank out of gate_options."
            )
        with torch.no_grad(), without_autocast(z.device):
            wide = z.detach().to(positions.dtype)
            square = (wide @ self.Q.to(positions.dtype) * wide).sum(-1)
            return square.clamp(min=0).sqrt()

    @torch.no_grad()
    def _feed(self, mask: Tensor | None, r: Tensor | None, z: Tensor, g: Tensor) -> None:
        fed = self._fed
        if fed is None:
            return
        g = g.detach().to(fed.dtype)
        if r is None:
            vectors, sizes = g.reshape(-1, g.shape[-1]), None
        else:
            vectors = (g * z.detach().to(fed.dtype)).sum(-1).reshape(-1, 1)  # mu
            sizes = r.reshape(-1).to(fed.dtype).square()
        real = (torch.ones_like(vectors[:, 0]) if mask is None else mask.reshape(-1)) != 0
        if sizes is not None:
            # Where w is 0, r tells nothing.
            real = real & sizes.isfinite()
            sizes = torch.where(real, sizes, 0)
        vectors = torch.where(real.unsqueeze(-1), vectors, 0)
        total = (real.to(fed.dtype) if sizes is None else sizes).sum()
        fed[:-1].add_((vectors.T @ vectors).reshape(-1))
        fed[-1:].add_(total)

    def _zeros(self, name: str) -> Tensor:
        if name != "_fed":
            return super()._zeros(name)
        return self.Q.new_zeros(*self.Q.shape[:-2], self.Q.shape[-1] ** 2 + 1)

    @property
    def size(self) -> Tensor:
        """E[||g||^2] as Q has it, the sum of its diagonal: `(...)`."""
        return self.Q.diagonal(dim1=-2, dim2=-1).sum(-1)

    @staticmethod
    def squares(fed: Tensor) -> Tensor:
        """||g||^2 of a step, summed up, of what it has fed: `(..., rank^2 + 1) -> (...)`."""
        rank = math.isqrt(fed.shape[-1] - 1)
        return fed[..., : -1 : rank + 1].sum(-1)

    @torch.no_grad()
    def fold(self, fed: Tensor, folded: Tensor) -> None:
        """Average what a step has fed, `(..., rank^2 + 1)`, into Q, for the `folded`th time."""
        total = fed[..., -1:]
        new = (fed[..., :-1] / torch.where(total > 0, total, 1)).to(self.Q.dtype)
        known = (total > 0) & new.isfinite().all(-1, keepdim=True)
        # From its first value on, as Adam's averages are after their correction.
        weight = ((1 - _DECAY) / (1 - _DECAY**folded)).to(self.Q.dtype).view(known.shape)
        change = torch.where(known, weight * (new - self.Q.flatten(-2)), 0)
        self.Q.add_(change.view_as(self.Q))
