"""A layer's output beside what changes it: how large both are, and their sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengate.kernels.eager import applied, has_tangent, is_eager, is_exported, is_watched
from tokengate.kernels.factors import Factors, Learn
from tokengate.kernels.fused import kernels_for
from tokengate.kernels.fused_sum import FusedSum, Sizes, fused_sum
from tokengate.kernels.gated_sum import (
    GatedSum,
    gated_sum,
    norms_without_bias,
    product_with_gain,
    without_bias,
)
from tokengate.kernels.gram import SizeOfProduct, norm_from_gram, norms_of_product
from tokengate.kernels.norms import Norms, accumulation_dtype, norms, opened, times
from tokengate.kernels.precision import without_autocast
from tokengate.kernels.traced_sum import FactoredSum, WholeSum


class Change:
    """M(x) and the output of the layer it is added to, once, weighted by position.

    Args:
        out: the layer's output, `(..., out_features)`.
        bias: `(out_features,)`, or None; w is `out` without it.
        m: M(x), whole, `(..., out_features)`, or in factors.
        in_place: `out` is nobody else's and may be written over.

    Raises:
        TokenGateError: factors do not fit `out`.
    """

    def __init__(
        self, out: Tensor, bias: Tensor | None, m: Tensor | Factors, in_place: bool = False
    ) -> None:
        self.out, self.bias, self.m = out, bias, m
        factors = m if isinstance(m, Factors) else None
        parts = (m,) if factors is None else (factors.z, factors.up)
        #: What a and mu are computed in: float32, or float64.
        self.dtype = accumulation_dtype(out, *parts)
        self.groups = None if factors is None else factors.groups
        eager = self.groups is None and is_eager(out, *parts)
        self._quick = eager and factors is not None
        self._fused = eager and kernels_for(out, *parts) is not None
        if factors is not None and self._quick:
            factors.check(out)
            # Through a view autograd would copy.
            plain = out.is_contiguous() and out._base is None and not is_watched()
            in_place = in_place and factors.gain is None and plain
        self._in_place = in_place
        self._at_once: Sizes | None = None
        # M(x) multiplied out, where its norms took that: the sum may use it up.
        self._product: Tensor | None = None
        self._norms: tuple[Norms, Norms] | None = None
        self._selected: tuple[Tensor, Tensor] | None = None
        #: Is called in backward with z and dL/dz_i as if a_i were 1, `(..., rank)`; of M(x) without
        #: factors with m and dL/dm_i.
        self.learn: Learn | None = None

    def norms(self) -> tuple[Norms, Norms]:
        """||m_i|| and ||w_i||, `(...)` each, without gradients; to be asked for before `add`."""
        if self._norms is None:
            self._norms = self._measured()
        return self._norms

    def decided(self, tau: Tensor, dtype: torch.dtype) -> Tensor:
        """S of eq. 4, `(...)`: booleans, or numbers in `dtype` where that takes no more work."""
        if self._fused and is_eager(tau) and tau.device == self.out.device:
            return self._measured_at_once().opened(tau.detach(), dtype)
        if self.groups is not None:
            tau = self.groups.spread(tau)
        return opened(*self.norms(), tau)

    def size_of_m(self) -> Tensor:
        """||m_i|| as a plain number in `dtype`, `(...)`, with gradients to M(x).

        Of factors M(x) is not kept; where that is compiled, of those without a gain.
        """
        out, m = self.out, self.m
        parts = (out, m.z, m.up, m.gain) if isinstance(m, Factors) else (m,)
        if not _derived(*parts):
            return times(*self.norms()[0]).to(self.dtype)
        by_gram = isinstance(m, Factors) and m.gain is None and m.groups is None
        if isinstance(m, Factors) and not (self._quick or by_gram):
            m = m.product(without_bias(out, self.bias))
        with without_autocast(out.device):
            if isinstance(m, Factors) and self._quick:
                of_w = (None, None) if m.gain is None else (out, self.bias)
                size = times(*self.norms()[0]).to(self.dtype)
                found: Tensor = applied(SizeOfProduct, *of_w, m.z, m.up, m.gain, size)
                return found
            if isinstance(m, Factors):
                m.check(out)
                return norm_from_gram(m.z, m.up).to(self.dtype)
            of_m: Tensor = torch.linalg.vector_norm(m, dim=-1, dtype=self.dtype)
            return of_m

    def size_of_w(self) -> Tensor:
        """||w_i|| as a plain number in `dtype`, `(...)`, with gradients to w, which is kept."""
        if not _derived(self.out):
            return times(*self.norms()[1])
        self._in_place = False
        with without_autocast(self.out.device):
            w = without_bias(self.out, self.bias)
            of_w: Tensor = torch.linalg.vector_norm(w, dim=-1, dtype=self.dtype)
            return of_w

    def _measured_at_once(self) -> Sizes:
        if self._at_once is None:
            with torch.no_grad():
                self._at_once = Sizes(self.out, self.bias, self.m)
        return self._at_once

    def _measured(self) -> tuple[Norms, Norms]:
        if self._fused:
            return self._measured_at_once().norms()
        if not (isinstance(self.m, Factors) and self._quick):
            m = self._product = self._whole() if isinstance(self.m, Factors) else self.m
            with without_autocast(self.out.device):
                w = without_bias(self.out.detach(), self.bias)
                # Sizes are constants to derivatives that are carried forward, too.
                return norms(m.detach(), self.dtype), norms(w.detach(), self.dtype)
        parts = (self.out, self.bias, self.m.z, self.m.up, self.m.gain)
        constant: Any = [None if part is None else part.detach() for part in parts]
        out, bias, z, up, gain = constant
        with without_autocast(self.out.device):
            if gain is None:
                return norms_of_product(z, up), norms_without_bias(out, bias)
            self._product, of_m, of_w = product_with_gain(out, z, bias, up, gain)
            return of_m, of_w

    def selects(self, a: Tensor, is_open: Tensor) -> None:
        """That `a` is 1 where `is_open` and 0 elsewhere, so that it need not be multiplied by."""
        self._selected = (a, is_open)

    def opened(self, a: Tensor) -> Tensor:
        """Where a is not 0, as booleans, `(...)`."""
        if a.dtype == torch.bool:
            return a
        known = self._selection(a)
        return a.detach() != 0 if known is None else known

    def _selection(self, a: Tensor | None) -> Tensor | None:
        if self._selected is None or self._selected[0] is not a:
            return None
        return self._selected[1]

    def undropped(self) -> Change:
        """As it would be without dropout, for its sizes: what is evaluated later has none."""
        plain = self.m.undropped if isinstance(self.m, Factors) else None
        return self if plain is None else Change(self.out, self.bias, plain())

    def multiplied_out(self) -> Tensor:
        """M(x) itself, `(..., out_features)`; to be asked for before `add`."""
        return self._whole() if isinstance(self.m, Factors) else self.m

    def _whole(self) -> Tensor:
        """M(x) of factors, multiplied out; the gradients are those of its factors.

        What is exported has no backward of its own, so there they go through here.
        """
        assert isinstance(self.m, Factors)
        derives = torch.is_grad_enabled() and is_exported()
        with torch.set_grad_enabled(derives), without_autocast(self.out.device):
            return self.m.product(without_bias(self.out, self.bias))

    def add(self, a: Tensor | None) -> Tensor:
        """out + a M(x), `(..., out_features)`; with a = 1 where it is None. To be called once.

        Backward gives `a` its dL/da_i = mu_i = <G_i, m_i> (eq. 10) at every position, of which
        factors keep no m.

        Args:
            a: `(...)`, in `dtype`, or booleans. Where it is 0 the output is `out`, but for what
                `GatedSum` says of -0.0, and of factors that are not finite.
        """
        out, bias, m, product = self.out, self.bias, self.m, self._product
        self._product = None
        if not isinstance(m, Factors):
            return out + m.to(out.dtype) if a is None else applied(WholeSum, out, m, a, self.learn)
        factors = (m.z, m.up, m.gain)
        if self._quick:
            with without_autocast(out.device):
                if not torch.is_grad_enabled():
                    if self._fused:
                        return fused_sum(out, bias, *factors, a, self._in_place)
                    return gated_sum(out, bias, *factors, a, product, self._in_place)
                ways = (self._in_place, self._selection(a), self.learn)
                function = FusedSum if self._fused else GatedSum
                return applied(function, out, bias, *factors, a, product, *ways)
        if a is None:
            return out + m.product(without_bias(out, bias))
        if product is None:
            product = self._whole()
        return applied(FactoredSum, out, product, bias, *factors, a, self.learn, self.groups)


def _derived(*parts: Tensor | None) -> bool:
    """Whether a derivative is to be taken of something that is made of these."""
    present = [part for part in parts if part is not None]
    backwards = torch.is_grad_enabled() and any(part.requires_grad for part in present)
    return backwards or any(has_tangent(part) for part in present)
