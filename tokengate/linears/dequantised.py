"""What a quantised layer becomes when its weight is merged: a dense one that takes what it took."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokengate.linears.quantised import is_four_bit, is_torchao


class DequantisedLinear(nn.Linear):
    """`(..., in_features) -> (..., out_features)`, in the dtype of the input.

    Never constructed: `fold` gives a quantised layer this class, and its own back. As the quantised
    one did, it computes in a dtype of its own, that of `weight`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in_features) -> (..., out_features)`."""
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight, bias).to(input.dtype)


def product_error(layer: nn.Linear) -> float:
    """How far a quantised layer's product may be from that of its dequantised weight, relatively.

    Measured: 0.008 for bitsandbytes' 8-bit layers, which in evaluation round their inputs, too, and
    0.004 for others in 16 bits, as some CPUs multiply; 0.01 and more where a library misreads W0.
    """
    if is_four_bit(layer) or is_torchao(layer.weight):
        return torch.finfo(torch.bfloat16).eps
    return 0.05


def compute_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype that a quantised layer computes in, as far as it says so."""
    if is_torchao(layer.weight):
        return layer.weight.dtype
    if is_four_bit(layer):
        own: torch.dtype | None = layer.compute_dtype  # type: ignore[assignment]
        return layer.weight.quant_state.dtype if own is None else own  # type: ignore[attr-defined]
    # bitsandbytes rounds the input of 8-bit layers to 16 bits, and casts the bias to its dtype.
    return torch.float16 if layer.bias is None else layer.bias.dtype
