"""The maps that a low-rank method multiplies by, apart from what they are multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tokengate.kernels.dropped_linear import branched_linear, dropped_linear, grouped_linear
from tokengate.kernels.factors import Factors
from tokengate.kernels.groups import Groups
from tokengate.kernels.precision import without_autocast
from tokengate.linears.convolution import Patches


@dataclass
class Maps:
    """M(x) = up act(down drop(x)) + gain * w. Of several layers, with one dimension more in front.

    Attributes:
        down: `(rank, in_features)`, in the dtype it is trained in.
        up: `(out_features, rank)`, in that of w.
        gain: `(out_features,)`, in that of w; None for 0.
        dropout: share of the elements of x that is dropped in training.
        activation: act; None for the identity.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None = None
    dropout: float = 0.0
    activation: Callable[[Tensor], Tensor] | None = None

    def factors(self, x: Tensor | Patches, training: bool) -> Factors:
        """M(x) in factors: `(..., in_features) -> (..., rank)`, and what is around it."""
        plain = partial(self.factors, x, False) if training and self.dropout else None
        if isinstance(x, Patches):
            with without_autocast(x.x.device):
                z = x.product(self.down, self.dropout, training, self.up.dtype)
        else:
            z = dropped_linear(x, self.down, self.dropout, training, self.up.dtype)
        return self._factors(z, plain)

    def grouped(self, x: Tensor, training: bool, groups: Groups) -> Factors:
        """The same of several layers, each of which has its own rows: `(N, in_features)`."""
        plain = partial(self.grouped, x, False, groups) if training and self.dropout else None
        z = grouped_linear(x, self.down, self.dropout, training, self.up.dtype, groups)
        return self._factors(z, plain, groups)

    def branch(self, x: Tensor, training: bool) -> tuple[Tensor, Factors]:
        """x for the base layer, and `factors`; see `branched_linear`."""
        plain = partial(self.factors, x, False) if training and self.dropout else None
        x, z = branched_linear(x, self.down, self.dropout, training)
        return x, self._factors(z, plain)

    def _factors(
        self, z: Tensor, plain: Callable[[], Factors] | None, groups: Groups | None = None
    ) -> Factors:
        z = z if self.activation is None else self.activation(z)
        return Factors(z, self.up, self.gain, groups, plain)
