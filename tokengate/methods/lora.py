"""LoRA: M(x) = scale B A x."""

from __future__ import annotations

import math

import torch
from torch import nn

from tokengate.arguments import count, share
from tokengate.errors import TokenGateError
from tokengate.kernels.up import scaled
from tokengate.linears.convolution import block_diagonal
from tokengate.linears.linear_like import groups_of
from tokengate.methods.base import Modification
from tokengate.methods.maps import Maps
from tokengate.methods.registry import register
from tokengate.methods.scaling import scale_of


@register("lora")
class LoRA(Modification):
    """M(x) = scale B A drop(x) (eq. 3; Hu et al., 2022, arXiv 2106.09685).

    `(..., in_features) -> (..., out_features)`.

    Parameters: `A` (rank, in_features), kaiming-uniform with a = sqrt(5); `B`
    (out_features, rank), zero. Beside a convolution A x is one with its kernel's size, stride,
    padding and dilation over all channels, and B one of 1x1 pixels in as many groups as it has, so
    that `B` is (out_channels, rank / groups), as in Hugging Face PEFT.

    Args:
        linear: the layer to modify.
        rank: r; 8 by default, as in Hugging Face PEFT.
        scale: the factor itself, as in Tables 6-8 of the gate's paper, which always use 0.5; that
            is the default.
        alpha: instead of `scale`: scale = alpha / rank, as in the LoRA paper.
        dropout: share of the inputs of A that is dropped in training.
        rslora: with `alpha`: scale = alpha / sqrt(rank), as in rsLoRA (arXiv 2312.03732).

    Raises:
        TokenGateError: an option is out of range, or both `scale` and `alpha` are given; `rank` is
            no multiple of a convolution's groups.
    """

    linear = stacks = True

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int = 8,
        scale: float | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__(linear)
        self.rank = count("rank", rank)
        self.scale = scale_of(self.rank, scale, alpha, rslora)
        self.dropout = share("dropout", dropout)
        self.groups = groups_of(linear)
        if self.rank % self.groups:
            raise TokenGateError(
                f"rank={self.rank} was given for a convolution with groups={self.groups}, of which "
                "each takes an equal part: pass a multiple of that for its pattern, rank={...}, or "
                "leave it out with exclude=."
            )
        self.A = self.new_parameter(self.rank, self.in_features)
        self.B = self.new_parameter(self.out_features, self.rank // self.groups)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def maps(self, linear: nn.Linear | None, dtype: torch.dtype) -> Maps:
        up = block_diagonal(scaled(self.B, self.scale, dtype), self.groups)
        return Maps(self.A, up, dropout=self.dropout)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"
