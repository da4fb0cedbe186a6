"""The parallel adapter: M(x) = scale U act(D x)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokengate.arguments import choice, count, finite, share
from tokengate.kernels.up import scaled
from tokengate.methods.base import Modification
from tokengate.methods.maps import Maps
from tokengate.methods.registry import register

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": F.tanh,
}


@register("adapter")
class Adapter(Modification):
    """M(x) = scale U act(D drop(x)) (He et al., 2022, arXiv 2110.04366).

    `(..., in_features) -> (..., out_features)`.

    The adapter beside one linear layer, as LLM-Adapters places it (Hu et al., 2023, arXiv
    2304.01933), not beside a whole block, and without biases.

    Parameters: `D` (rank, in_features), kaiming-uniform with a = sqrt(5); `U`
    (out_features, rank), zero.

    Args:
        linear: the layer to modify.
        rank: the bottleneck; 32 by default, as in section 4.3 of the gate's paper.
        scale: the factor itself; 0.5 by default, as in its Table 8.
        activation: "relu" (He et al.), "gelu", "silu" or "tanh" (LLM-Adapters).
        dropout: share of the inputs of D that is dropped in training.

    Raises:
        TokenGateError: an option is out of range.
    """

    stacks = True

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int = 32,
        scale: float = 0.5,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(linear)
        self.rank = count("rank", rank)
        self.scale = finite("scale", scale)
        self.activation = choice("activation", activation, _ACTIVATIONS)
        self.dropout = share("dropout", dropout)
        self.D = self.new_parameter(self.rank, self.in_features)
        self.U = self.new_parameter(self.out_features, self.rank)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))
        nn.init.zeros_(self.U)

    def maps(self, linear: nn.Linear | None, dtype: torch.dtype) -> Maps:
        up = scaled(self.U, self.scale, dtype)
        return Maps(self.D, up, None, self.dropout, _ACTIVATIONS[self.activation])

    def extra_repr(self) -> str:
        return (
            f"rank={self.rank}, scale={self.scale:g}, activation={self.activation}, "
            f"dropout={self.dropout:g}"
        )
