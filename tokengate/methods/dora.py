"""DoRA: the direction and the length of each row of the weight, learned apart."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import DifferentBaseWarning, TokenGateError
from tokengate.kernels.eager import is_captured, is_eager, is_exported
from tokengate.kernels.fused import kernels_for
from tokengate.kernels.precision import without_autocast
from tokengate.kernels.up import scaled_rows
from tokengate.linears.convolution import block_diagonal
from tokengate.linears.linear_like import holder, in_memory, whole
from tokengate.linears.quantised import unreadable
from tokengate.methods.lora import LoRA
from tokengate.methods.maps import Maps
from tokengate.methods.registry import register
from tokengate.methods.row_squares import row_squares, row_squares_and_products
from tokengate.sharding import divided_as, is_absent, is_sharded, present

# Rows whose lengths differ by more are another W0's, not one that was cast or quantised.
_FAR = 0.01
# Elements of a W0 that is as large as the intermediate results without which its norms are had.
_SMALL = 2**14


@register("dora")
class DoRA(LoRA):
    """M(x) = (c - 1) w + c (scale B A drop(x)), w = W0 x (Liu et al., 2024, arXiv 2402.09353).

    `(..., in_features) -> (..., out_features)`.

    c = magnitude / the norm of each row of W0 + scale B A. The norm is a constant in backward
    (section 4.3 there); the bias is never scaled. No matrix of W0's size is made, unless that is
    small: the norm comes from products of size r, in W0's dtype, and c - 1 = (magnitude - norm) /
    norm from float32. A quantised W0 is dequantised a few rows at a time.

    Dropout acts on the low-rank path alone. Hugging Face PEFT, in training with dropout, also
    multiplies W0 with the dropped input a second time and takes that for w in the first term;
    without dropout both are the same.

    Parameters: `A` and `B` as in LoRA; `magnitude` (out_features,), at first the row norms of W0.
    Until it or B is trained or loaded it follows W0: where that is loaded, cast or written over,
    the next forward sets `magnitude` anew, and M(x) stays 0. (Compiled code does so in training; in
    evaluation it computes as if.) Afterwards it stays what it is, and a base that is loaded then,
    with other row norms, draws a warning.

    All norms are computed in each forward, of what W0, A and B are then: W0 is read once for its
    rows' lengths and once for its product with A; on a GPU, where kernels do it, once for both.

    Args:
        linear: the layer to modify.
        **options: those of LoRA: `rank`, `scale`, `alpha`, `rslora`, `dropout`.

    Raises:
        TokenGateError: an option is out of range, or both `scale` and `alpha` are given; W0 is held
            in a form from which its rows cannot be read.
    """

    stacks = True

    def __init__(self, linear: nn.Linear, **options: Any) -> None:
        super().__init__(linear, **options)
        reason = unreadable(whole(linear))
        if reason is not None:
            raise TokenGateError(f'DoRA reads W0, which {reason}, or choose method="lora".')
        self.magnitude = self.new_parameter(self.out_features)
        # W0's row norms that `magnitude` began from; None where a state dict gave it.
        with present([whole(linear).weight]):
            self._began: Tensor | None = row_squares(linear).sqrt()
        self._is_trained = self._base_was_loaded = self._is_sharded = False

    def reset_parameters(self) -> None:
        super().reset_parameters()
        began = self._began
        if began is None or began.is_meta:
            # The next forward, which sees W0, knows them.
            began = torch.full(self.magnitude.shape, math.nan, dtype=self.magnitude.dtype)
        self._began, self._is_trained = began.to(self.magnitude.device), False
        with torch.no_grad():
            self.magnitude.copy_(divided_as(self._began, self.magnitude))

    def maps(self, linear: nn.Linear | None, dtype: torch.dtype) -> Maps:
        if linear is None:
            raise TokenGateError(
                "DoRA was called without its base layer, whose weight it reads: call the patched "
                "layer, or factors(x, w, layer).product(w)."
            )
        quick = self._scaled_at_once(linear, dtype)
        if quick is not None:
            return Maps(self.A, *quick, self.dropout)
        norm = self.row_norms(linear)
        magnitude = self._followed(linear)
        # A row of zeros has no direction: it contributes 0 whatever c is, and 0 / 0 must not.
        gain = (magnitude - norm) / torch.where(norm > 0, norm, torch.inf)
        if not (self.B.device.type == "cpu" and is_eager(self.B) and self.B.all()):
            # Another device or compiler sums the same row to another last digit. Where B is still
            # 0, that is all there can be: no change, but its gradient.
            noise = (self.B == 0).all(-1) & (gain.abs() <= 4 * torch.finfo(norm.dtype).eps)
            gain = torch.where(noise, gain - gain.detach(), gain)
        up = block_diagonal((self.scale * (1 + gain)).unsqueeze(-1) * self.B, self.groups)
        return Maps(self.A, up.to(dtype), gain.to(dtype), self.dropout)

    def _scaled_at_once(
        self, linear: nn.Linear, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """up and gain by kernels, which follow W0 without asking what is trained."""
        stacked = self.magnitude.dim() > 1
        if stacked or not is_eager(self.magnitude) or kernels_for(self.magnitude) is None:
            return None
        weight = in_memory(linear)
        if weight is None or not is_eager(weight) or kernels_for(weight) is None:
            return None
        if self._base_was_loaded and self._began is not None:
            self._followed(linear)  # says, once, what is to be said of it
        began = None if self._is_trained else self._began
        if began is not None and began.device != weight.device:
            began = self._began = began.to(weight.device)
        magnitude = self.magnitude
        own = isinstance(magnitude, nn.Parameter)  # and not what `functional_call` was given
        return scaled_rows(weight, self.A, self.B, magnitude, began, self.scale, dtype, own)

    @torch.no_grad()
    def row_norms(self, linear: nn.Linear) -> Tensor:
        """Norms of the rows of W0 + scale B A: `(out_features,)`, or of each of several layers.

        ||W_j + s B_j A||^2 = ||W_j||^2 + 2 s <B_j, W_j A'> + s^2 B_j A A' B_j'.
        """
        # Autocast would copy all of W0 to 16 bits.
        with without_autocast(holder(linear).device):
            weight = in_memory(linear) if self.B.dim() == 2 else None
            if weight is not None and weight.numel() <= _SMALL and weight.dtype == self.B.dtype:
                up = block_diagonal(self.B, self.groups)
                whole = torch.addmm(weight, up, self.A, alpha=self.scale)
                norm: Tensor = torch.linalg.vector_norm(whole, dim=-1).detach()
                return norm
            B = block_diagonal(self.scale * self.B, self.groups)
            squares, cross = row_squares_and_products(linear, self.A.mT)
            own = B @ (self.A @ self.A.mT)
            squares = squares + ((2 * cross.to(B.dtype) + own) * B).sum(-1)
        return squares.clamp(min=0).sqrt().detach()

    @torch.no_grad()
    def refresh(self, linear: nn.Linear) -> None:
        sharded = self._is_sharded or is_sharded(self.magnitude)
        weight = holder(linear)
        if not (sharded or weight.is_meta or is_absent(weight)):
            self._followed(linear)

    def was_loaded(self) -> None:
        self._began = None

    def _followed(self, linear: nn.Linear) -> Tensor:
        """`magnitude`, set to W0's row norms as long as nobody has trained or loaded it: `(d,)`."""
        began, magnitude = self._began, self.magnitude
        if began is None or magnitude.is_meta or (self._is_trained and not self._base_was_loaded):
            return magnitude
        norms = row_squares(linear).sqrt().to(magnitude).detach()
        began = norms if began.is_meta else began.to(norms)
        same = (magnitude == began) | (magnitude.isnan() & began.isnan())
        untrained = same.all(-1) & ~self.B.flatten(-2).any(-1)
        is_own = isinstance(magnitude, nn.Parameter)  # and not what `functional_call` was given
        if not (is_own and is_eager(magnitude, norms)) or is_captured():
            return self._followed_unseen(norms, untrained, is_own)
        if not self._is_trained:
            self._is_trained = not untrained.all().item()
        if not torch.equal(norms, began):
            self._base_was_written(norms, began)
        self._base_was_loaded = False
        return magnitude

    def _base_was_written(self, norms: Tensor, began: Tensor) -> None:
        if self._is_trained:
            far = (norms - began).abs() > _FAR * norms
            if self._base_was_loaded and far.any():
                warnings.warn(
                    "DoRA's W0 was loaded after its magnitude, which was trained or set beside "
                    "a W0 with other row norms: load W0 before you patch or train, or, if they "
                    "belong together, load the magnitude with it.",
                    DifferentBaseWarning,
                    stacklevel=2,
                )
        elif self._is_sharded:
            raise TokenGateError(
                "DoRA's W0 was loaded after the model was sharded, where the magnitude cannot "
                "follow its row norms: load W0 before fully_shard, or load the magnitude with it."
            )
        else:
            with torch.no_grad():
                self.magnitude.copy_(norms)
        self._began = norms

    def _followed_unseen(self, norms: Tensor, untrained: Tensor, is_own: bool) -> Tensor:
        """The same where no code may depend on values, or write them."""
        magnitude = self.magnitude
        kept = (magnitude - magnitude.detach()).nan_to_num()  # 0, and its gradient
        followed = torch.where(untrained.unsqueeze(-1), norms + kept, magnitude)
        writes = is_own and torch.compiler.is_compiling() and torch.is_grad_enabled()
        if writes and not is_exported() and self._began is not None:
            # What trains must be the parameter itself.
            with torch.no_grad():
                magnitude.copy_(followed)
                # Another tensor: one from within inference mode could not be written to.
                self._began = torch.where(untrained.unsqueeze(-1), norms, self._began)
            return magnitude
        return followed

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}magnitude" in state_dict:
            self._began = None
        self._base_was_loaded, self._is_sharded = True, is_sharded(self.magnitude)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
