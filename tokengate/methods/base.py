"""What a method is: M of eq. 1, beside one frozen linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokengate.gates.registry import with_defaults
from tokengate.kernels.eager import is_eager
from tokengate.kernels.factors import Factors
from tokengate.kernels.precision import KeepsFloat32, autocasts, trainable_dtype
from tokengate.linears.linear_like import features_of
from tokengate.linears.stand_in import stand_in, write_over
from tokengate.methods.maps import Maps

# The gradients of an input with fewer elements are added up sooner than Python is asked to do it.
_LARGE = 2**17
# What every call reads anew, so that it may be set later than by `patch`.
_SETTABLE = ("scale", "dropout", "activation")


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
      what is of size rank, where it would keep all of M(x); and it may read the base layer. Where
      its factors are `Maps`, which do not depend on x, it defines these. Of a class and those it
      extends, the latest definition of the three counts. Forward hooks on a modification see calls
      of `forward` only.
    - Every call is computed from the values that parameters and W0 have then, and nothing of an
      earlier one is kept: PyTorch tells nobody of what is written through `.data`, a NumPy view,
      shared memory or a collective, as averages of weights and sharded optimisers do.
    - The base layer is not kept: what is wanted of it once is read in `__init__`.

    Args:
        linear: the layer that is to be modified; it is only read.
    """

    linear: ClassVar[bool] = False
    """Whether M(x), without dropout, is a matrix times x, so that `fold` can add it to W0."""
    stacks: ClassVar[bool] = False
    """Whether `maps` takes parameters of several layers too, each with one dimension in front. If
    not, it is asked layer by layer where a module has many, as experts."""
    reads_w: ClassVar[bool] = True
    """Whether the values of w are asked for, not its dtype alone."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ways = {"forward", "factors", "maps"}
        own = ways & vars(next(c for c in cls.__mro__ if ways & vars(c).keys())).keys()
        if "factors" not in own:
            # Else the inherited factors would be asked, and what is new never run.
            cls.factors = Modification.factors if "maps" in own else _no_factors  # type: ignore
        cls.reads_w = cls.factors is not Modification.factors
        if ways & vars(cls).keys() and "stacks" not in vars(cls):
            cls.stacks = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = features_of(linear)
        self._dtype = trainable_dtype(linear.weight)
        self._device = linear.weight.device

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A trainable parameter of `shape`, without values until `reset_parameters`."""
        return nn.Parameter(torch.empty(shape, dtype=self._dtype, device=self._device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Modification:
        drawn = any(buffer.is_meta for buffer in self.buffers(recurse=False))
        super()._apply(fn, recurse)
        if drawn and not self._is_meta():  # what is reset is the parameters
            linear = stand_in(self.in_features, self.out_features, self, self._dtype)
            fresh = type(self)(linear, **self.options)
            write_over(self.buffers(recurse=False), fresh.buffers(recurse=False))
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Those that `patch` was given for this layer; what was set since replaces them.

        A scale, a dropout or an activation, of methods whose attribute of that name is the option
        as it was given.
        """
        options = self._options
        for name, made_with in self._made_with.items():
            now = _plain(getattr(self, name, None))
            if now is None or made_with in (None, now):
                continue
            given = with_defaults(type(self), self._options).get(name, math.nan)
            if given is None or given == made_with or isinstance(given, str):
                instead = ("alpha", "rslora") if name == "scale" else ()
                options = {**{k: v for k, v in options.items() if k not in instead}, name: now}
        return options

    @options.setter
    def options(self, options: dict[str, Any]) -> None:
        self._options = dict(options)
        self._made_with = {name: _plain(getattr(self, name, None)) for name in _SETTABLE}

    @property
    def has_factors(self) -> bool:
        """Whether it may give M(x) in factors."""
        return type(self).factors is not _no_factors

    @property
    def factor_rank(self) -> int | None:
        """The size of z, where M(x) has factors and the method an attribute `rank` of that size."""
        rank = getattr(self, "rank", None) if self.has_factors else None
        return rank if isinstance(rank, int) else None

    def factors(self, x: Tensor, w: Tensor, linear: nn.Linear | None) -> Factors | None:
        """M(x) as `Factors`, or None where the method has only a `forward`; by default of `maps`.

        Args:
            x: the layer's input, `(..., in_features)`.
            w: W0 x, `(..., out_features)`.
            linear: the base layer; None where M is asked for apart from a layer.
        """
        maps = self.maps(linear, w.dtype)
        return None if maps is None else maps.factors(x, self.training)

    def refresh(self, linear: nn.Linear) -> None:
        """Bring what follows the base layer up to date, before it is saved."""

    def was_loaded(self) -> None:
        """Its parameters have been given the values of a saved adapter."""

    def factors_before(self, x: Tensor, linear: nn.Linear) -> tuple[Tensor, Factors | None]:
        """The input for `linear`, and `factors` where they need nothing of its output.

        Their gradient is then added in place to that which `linear` gives its input. Where that
        would gain nothing, or could be seen by others, there is None instead of factors.

        Args:
            x: the layer's input, `(..., in_features)`.
            linear: the base layer; one of PyTorch's own, which do not keep that gradient.
        """
        if self.reads_w or not torch.is_grad_enabled() or not is_eager(x) or x.numel() < _LARGE:
            return x, None
        weight = linear.weight
        if (
            not (x.requires_grad and is_eager(weight))
            or x.dtype != weight.dtype
            or autocasts(x.device)
            # The base layer says what is wrong with an input.
            or x.shape[-1] != self.in_features
        ):
            return x, None
        maps = self.maps(linear, x.dtype)
        return (x, None) if maps is None else maps.branch(x, self.training)

    def maps(self, linear: nn.Linear | None, dtype: torch.dtype) -> Maps | None:
        """What M multiplies by, computed in `dtype`, that of w; `linear` as in `factors`."""
        return None

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """M(x), with w = W0 x: `(..., in_features), (..., out_features) -> (..., out_features)`."""
        factors = self.factors(x, w, None)
        if factors is None:
            raise NotImplementedError(
                f"{type(self).__name__} must define forward(x, w) or factors(x, w, linear)."
            )
        return factors.product(w)


def _plain(value: Any) -> float | str | None:
    """As JSON can hold it, of a word, a number or a tensor of one; None of anything else."""
    if isinstance(value, str):
        return value
    one = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    return float(value) if one and not isinstance(value, nn.Parameter) else None


def _no_factors(self: Modification, x: Tensor, w: Tensor, linear: nn.Linear | None) -> None:
    """The modification has only a forward."""
