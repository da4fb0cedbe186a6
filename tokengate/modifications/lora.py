"""LoRA: M(x) = scale B A x."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from tokengate.arguments import count, positive, share
from tokengate.errors import TokenGateError
from tokengate.modifications.base import Modification
from tokengate.modifications.registry import register


@register("lora")
class LoRA(Modification):
    """M(x) = scale B A drop(x) (eq. 3; Hu et al., 2022, arXiv 2106.09685).

    Parameters: `A` (rank, in_features), kaiming-uniform with a = sqrt(5); `B`
    (out_features, rank), zero.

    Args:
        linear: the layer to modify.
        rank: r.
        scale: the factor itself, as in Tables 6-8 of the gate's paper, which always use 0.5; that
            is the default.
        alpha: instead of `scale`: scale = alpha / rank, as in the LoRA paper.
        dropout: share of the inputs of A that is dropped in training.

    Raises:
        TokenGateError: an option is out of range, or both `scale` and `alpha` are given.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int = 8,
        scale: float | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(linear)
        self.rank = count("rank", rank)
        if scale is not None and alpha is not None:
            raise TokenGateError(
                f"scale={scale!r} and alpha={alpha!r} were both given: pass one of them; "
                "scale = alpha / rank."
            )
        if alpha is not None:
            self.scale = positive("alpha / rank", positive("alpha", alpha) / self.rank)
        else:
            self.scale = 0.5 if scale is None else positive("scale", scale)
        self.dropout = share("dropout", dropout)
        self.A = self.new_parameter(self.rank, self.in_features)
        self.B = self.new_parameter(self.out_features, self.rank)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """`(..., in_features), (..., out_features) -> (..., out_features)`; `w` is not used."""
        z = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))
        return F.linear(self.scale * z, self.B.to(z.dtype))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"
