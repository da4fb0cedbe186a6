"""AdaLoRA: M(x) = scale P diag(E) Q x, whose rank a `RankAllocator` lowers in training."""

from __future__ import annotations

import torch
from torch import nn

from tokengate.arguments import count, share
from tokengate.errors import TokenGateError
from tokengate.kernels.up import scaled
from tokengate.methods.base import Modification
from tokengate.methods.maps import Maps
from tokengate.methods.registry import register
from tokengate.methods.scaling import scale_of


@register("adalora")
class AdaLoRA(Modification):
    """M(x) = scale P diag(E) Q drop(x) (Zhang et al., 2023, arXiv 2303.10512).

    `(..., in_features) -> (..., out_features)`.

    Add `orthogonality(model)` to the loss, and make a `RankAllocator` beside the optimiser.

    Parameters: `P` (out_features, rank) and `Q` (rank, in_features), normal with standard
    deviation 0.02; `E` (rank,), zero.

    Args:
        linear: the layer to modify.
        rank: the initial rank; 12 by default, as in Hugging Face PEFT, and 64 in section 4.1 of the
            gate's paper.
        target_rank: what this layer adds to the final budget, which the allocator spends over all
            layers together: from 0 to `rank`; half of `rank` by default, as in the gate's paper.
        scale: the factor itself; 0.5 by default.
        alpha: instead of `scale`: scale = alpha / rank, which stays so when the rank falls. (PEFT
            divides by rank + 1e-5.)
        dropout: share of the inputs of Q that is dropped in training.

    Raises:
        TokenGateError: an option is out of range, or both `scale` and `alpha` are given.
    """

    linear = stacks = True

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int = 12,
        target_rank: int | None = None,
        scale: float | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(linear)
        self.rank = count("rank", rank)
        self.target_rank = self.rank // 2
        if target_rank is not None:
            self.target_rank = count("target_rank", target_rank, least=0)
        if self.target_rank > self.rank:
            raise TokenGateError(
                f"target_rank={target_rank} is above rank={rank}: the rank starts at `rank` and "
                "falls, so pass a smaller target_rank or a larger rank."
            )
        self.scale = scale_of(self.rank, scale, alpha)
        self.dropout = share("dropout", dropout)
        self.P = self.new_parameter(self.out_features, self.rank)
        self.E = self.new_parameter(self.rank)
        self.Q = self.new_parameter(self.rank, self.in_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.P, std=0.02)
        nn.init.zeros_(self.E)
        nn.init.normal_(self.Q, std=0.02)

    def maps(self, linear: nn.Linear | None, dtype: torch.dtype) -> Maps:
        up = scaled(self.P, self.scale, dtype, self.E)
        return Maps(self.Q, up, dropout=self.dropout)

    def extra_repr(self) -> str:
        return (
            f"rank={self.rank}, target_rank={self.target_rank}, scale={self.scale:g}, "
            f"dropout={self.dropout:g}"
        )
