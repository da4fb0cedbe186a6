"""DoRA: the direction and the length of each row of the weight, learned apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.kernels.precision import without_autocast
from tokengate.linears.linear_like import product, whole
from tokengate.linears.quantised import unreadable
from tokengate.methods.lora import LoRA
from tokengate.methods.maps import Maps
from tokengate.methods.registry import register
from tokengate.methods.remembered import Remembered
from tokengate.methods.row_squares import RowSquares, weight_key


@register("dora")
class DoRA(LoRA):
    """M(x) = (c - 1) w + c (scale B A drop(x)), w = W0 x (Liu et al., 2024, arXiv 2402.09353).

    `(..., in_features) -> (..., out_features)`.

    c = magnitude / the norm of each row of W0 + scale B A. The norm is a constant in backward
    (section 4.3 there); the bias is never scaled. No matrix of W0's size is made: the norm comes
    from products of size r, in W0's dtype, and c - 1 = (magnitude - norm) / norm from float32. A
    quantised W0 is dequantised a few rows at a time.

    Dropout acts on the low-rank path alone. Hugging Face PEFT, in training with dropout, also
    multiplies W0 with the dropped input a second time and takes that for w in the first term;
    without dropout both are the same.

    Parameters: `A` and `B` as in LoRA; `magnitude` (out_features,), the row norms that W0 has when
    the layer is patched. Where W0 changes afterwards, M(x) is no longer 0 at initialisation, so
    load and cast the base first. The norms of W0's rows are remembered until it changes, those of
    W0 + scale B A until one of the three does (not under `torch.compile`, which computes them every
    time). PyTorch does not see a change made through `.data`: call `forget_base()` after one; of A
    and B, `train()` and `eval()` do.

    Args:
        linear: the layer to modify.
        **options: those of LoRA: `rank`, `scale`, `alpha`, `rslora`, `dropout`.

    Raises:
        TokenGateError: an option is out of range, or both `scale` and `alpha` are given; W0 is held
            in a form from which its rows cannot be read.
    """

    def __init__(self, linear: nn.Linear, **options: Any) -> None:
        super().__init__(linear, **options)
        reason = unreadable(whole(linear))
        if reason is not None:
            raise TokenGateError(f'DoRA reads W0, which {reason}, or choose method="lora".')
        self._base_squares = RowSquares()
        self._initial_squares = self._base_squares.of(linear)
        self.magnitude = self.new_parameter(self.out_features)
        self._norms: Remembered[Tensor] = Remembered()

    def reset_parameters(self) -> None:
        if self._initial_squares.is_meta and not self.magnitude.is_meta:
            raise TokenGateError(
                "DoRA was patched on the meta device, where W0 has no row norms to start from: "
                "load a state dict, or unpatch and patch again."
            )
        super().reset_parameters()
        with torch.no_grad():
            self.magnitude.copy_(self._initial_squares.sqrt())

    def maps(self, linear: nn.Linear | None, dtype: torch.dtype) -> Maps:
        if linear is None:
            raise TokenGateError(
                "DoRA was called without its base layer, whose weight it reads: call the patched "
                "layer, or factors(x, w, layer).product(w)."
            )
        norm = self.row_norms(linear)
        # A row of zeros has no direction: it contributes 0 whatever c is, and 0 / 0 must not.
        directed = norm > 0
        change = (self.magnitude - norm) / torch.where(directed, norm, 1.0)
        # Another device or compiler sums the same row to another last digit. Where B is still 0,
        # that is all there can be: no change, but its gradient.
        noise = (self.B == 0).all(1) & (change.abs() <= 4 * torch.finfo(norm.dtype).eps)
        change = torch.where(noise, change - change.detach(), change)
        gain = torch.where(directed, change, 0.0)
        up = (self.scale * (1 + gain)).unsqueeze(1) * self.B
        return Maps(self.A, up.to(dtype), gain.to(dtype), self.dropout)

    def row_norms(self, linear: nn.Linear) -> Tensor:
        """Norms of the rows of W0 + scale B A: `(out_features,)`; remembered.

        ||W_j + s B_j A||^2 = ||W_j||^2 + 2 s <B_j, W_j A'> + s^2 B_j A A' B_j'.
        """
        dtype = self.magnitude.dtype
        return self._remembered(self._norms, dtype, linear, lambda: self._row_norms(linear))

    @torch.no_grad()
    def _row_norms(self, linear: nn.Linear) -> Tensor:
        # Autocast would copy all of W0 to 16 bits.
        with without_autocast(linear.weight.device):
            B = self.scale * self.B
            cross = product(linear, self.A.T).to(B.dtype)
            own = B @ (self.A @ self.A.T)
            squares = self._base_squares.of(linear) + ((2 * cross + own) * B).sum(1)
        return squares.clamp(min=0).sqrt()

    def forget_base(self) -> None:
        """Compute the row norms of W0 anew in the next forward."""
        self._base_squares.forget()
        super().forget_base()

    def _base_key(self, linear: nn.Linear) -> tuple[object, ...] | None:
        return weight_key(linear)

    def _forget(self) -> None:
        super()._forget()
        if "_norms" in self.__dict__:
            self._norms.forget()
