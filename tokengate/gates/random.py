"""The baseline that every gate must beat: positions closed by a seeded draw."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from tokengate.arguments import count, share
from tokengate.gates.base import Gate
from tokengate.gates.positions import Positions
from tokengate.gates.registry import register_gate
from tokengate.kernels.eager import is_eager, is_exported
from tokengate.kernels.powers_of_two import bits

_CHANNELS, _BITS = 16, 24


@register_gate("random")
class RandomGate(Gate):
    """a_i = 0 with probability `sparsity`, else 1, whatever M(x) is.

    Drawn from the seed and the bits of the first 16 numbers of x_i, so that a position is decided
    alike whenever the same is computed (again in backward, on every rank); where x is rounded
    otherwise, as with a cache and without, the draw is another. Layers that see the same input
    close the same positions, unless they are given other seeds.

    Args:
        linear: the layer that is gated.
        sparsity: the share of closed positions, in [0, 1).
        seed: of the draw.

    Raises:
        TokenGateError: `sparsity` is not in [0, 1), or `seed` no number >= 0.
    """

    def __init__(self, linear: nn.Linear, *, sparsity: float = 0.5, seed: int = 0) -> None:
        super().__init__(linear)
        self.sparsity = share("sparsity", sparsity)
        generator = torch.Generator().manual_seed(count("seed", seed, least=0))
        channels = min(_CHANNELS, self.in_features)
        drawn = torch.randint(2**62, (channels,), generator=generator) | 1
        # No buffer, which `to_empty` would leave without its values, and nothing could give back.
        self._drawn = drawn

    def weights(self, positions: Positions) -> Tensor:
        """a, `(...)`, as booleans."""
        x = positions.x.detach()[..., : len(self._drawn)].float().contiguous()
        factors = self._drawn.to(x.device)
        if is_eager(x):
            self._drawn = factors
        # Of 64 bits, which a product and two shifts mix.
        if is_exported():  # ONNX reads no number as another, and sums no 64 bits
            parts = (bits(x) * factors).unbind(-1)
            drawn = functools.reduce(torch.add, parts)
        else:
            drawn = (x.view(torch.int32).long() * factors).sum(-1)
        drawn = (drawn ^ (drawn >> 31)) * 0x2545F4914F6CDD1D
        drawn = (drawn ^ (drawn >> 29)) & (2**_BITS - 1)
        is_open: Tensor = drawn >= self.sparsity * 2**_BITS
        return is_open
