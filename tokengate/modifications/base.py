"""What a method is: M of eq. 1, beside one frozen linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokengate.precision import KeepsFloat32, trainable_dtype


class Modification(KeepsFloat32):
    """M(x) of eq. 1 for one frozen linear layer. A method is a subclass of about ten lines:

        @tokengate.register("diagonal")
        class Diagonal(tokengate.Modification):
            def __init__(self, linear, *, scale=1.0):
                super().__init__(linear)
                self.scale = scale
                self.gain = self.new_parameter(self.out_features)

            def reset_parameters(self):
                nn.init.zeros_(self.gain)

            def forward(self, x, w):
                return self.scale * self.gain.to(w.dtype) * w

    The rules:

    - The keyword-only arguments of `__init__` are the options a user may pass to `patch`; check
      them there, and raise `TokenGateError`.
    - Trainable parameters come from `new_parameter`, which knows dtype and device. They stay
      float32 beside a 16-bit base, so cast them to the input's dtype where they are used.
    - `reset_parameters` gives them their initial values, with which M(x) = 0 for every x.
    - The base layer is not kept here: what is wanted of it is read in `__init__`.

    Args:
        linear: the layer that is to be modified; it is only read.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._dtype = trainable_dtype(linear.weight)
        self._device = linear.weight.device

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A trainable parameter of `shape`, without values until `reset_parameters`."""
        return nn.Parameter(torch.empty(shape, dtype=self._dtype, device=self._device))

    def reset_parameters(self) -> None:
        """Give the parameters their initial values, with which M(x) = 0 for every x."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters().")

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """M(x), with w = W0 x: `(..., in_features), (..., out_features) -> (..., out_features)`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, w).")
