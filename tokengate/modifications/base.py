"""What a method is: M of eq. 1, beside one frozen linear layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokengate.factors import Factors
from tokengate.linear_like import features_of
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
      them there, and raise `TokenGateError`. A subclass with `**options` also takes the options of
      the class it extends. An option's value may not be a dict: to `patch`, a dict gives one
      value for each pattern of layers.
    - Trainable parameters come from `new_parameter`, which knows dtype and device. They stay
      float32 beside a 16-bit base, so cast them to w's dtype where they are used. What is frozen
      and drawn from a seed is a buffer with `persistent=False`, on `linear.weight.device`.
    - `reset_parameters` gives them their initial values, with which M(x) = 0 for every x.
    - `forward` gives M(x), in the shape of w.
    - A method of low rank defines `factors` instead of `forward`. Its gate then keeps for backward
      what is of size rank, where it would keep all of M(x); and it may read the base layer. Of a
      class and those it extends, the later definition of the two counts. Forward hooks on a
      modification see calls of `forward` only.
    - The base layer is not kept: what is wanted of it once is read in `__init__`.

    Args:
        linear: the layer that is to be modified; it is only read.
    """

    linear: ClassVar[bool] = False
    """Whether M(x), without dropout, is a matrix times x, so that `fold` can add it to W0."""
    options: dict[str, Any]
    """Those that `patch` was given for this layer."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        first = next(c for c in cls.__mro__ if "forward" in vars(c) or "factors" in vars(c))
        if "factors" not in vars(first):
            # Else the inherited factors would be asked, and the new forward never run.
            cls.factors = Modification.factors  # type: ignore[method-assign]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = features_of(linear)
        self._dtype = trainable_dtype(linear.weight)
        self._device = linear.weight.device

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A trainable parameter of `shape`, without values until `reset_parameters`."""
        return nn.Parameter(torch.empty(shape, dtype=self._dtype, device=self._device))

    def reset_parameters(self) -> None:
        """Give the parameters their initial values, with which M(x) = 0 for every x."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters().")

    def factors(self, x: Tensor, w: Tensor, linear: nn.Linear | None) -> Factors | None:
        """M(x) as `Factors`, or None where the method has only a `forward`.

        Args:
            x: the layer's input, `(..., in_features)`.
            w: W0 x, `(..., out_features)`.
            linear: the base layer; None where M is asked for apart from a layer.
        """
        return None

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """M(x), with w = W0 x: `(..., in_features), (..., out_features) -> (..., out_features)`."""
        factors = self.factors(x, w, None)
        if factors is None:
            raise NotImplementedError(
                f"{type(self).__name__} must define forward(x, w) or factors(x, w, linear)."
            )
        return factors.product(w)
