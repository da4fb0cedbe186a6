"""W0 and the weight it was merged to: one of them is in place, the other can take its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.linears.class_swap import become, own_class
from tokengate.linears.dequantised import DequantisedLinear
from tokengate.linears.linear_like import LinearLike, has_own_weight, write_rows
from tokengate.linears.quantised import is_quantised


class MergedWeight:
    """Both weights of one layer; W0 is in place at first.

    In the same parameter, of which only the memory changes and nothing is copied.
    """

    def __init__(self, layer: LinearLike, merged: Tensor) -> None:
        self.layer, self.in_place = layer, False
        self._W0 = self._read()
        self._merged: Tensor | None = merged  # None while it is in place

    def put(self, merged: bool) -> None:
        """The merged weight in place, or W0, on the device and in the dtype of today.

        Interrupted, it can be called again, with either.

        Raises:
            TokenGateError: the weight has no values, being on the meta device.
        """
        if self.layer.weight.is_meta:
            if merged == self.in_place:
                return
            raise TokenGateError(
                f"a {type(self.layer).__name__} was offloaded after it was folded, so that W0 "
                "cannot take its weight's place: take the offloading's hooks off first."
            )
        if not merged:
            if self.in_place:
                self._merged = self._read()  # which may have been moved, cast or trained
            self._write(self._W0)
            self.in_place = False
        elif self._merged is not None:
            self._write(self._merged)
            self.in_place = True
            self._merged = None

    def _read(self) -> Tensor:
        return self.layer.weight.data

    def _write(self, value: Tensor) -> None:
        weight = self.layer.weight
        weight.data = value.to(weight)


class _MergedRows(MergedWeight):
    """Of a layer whose weight is rows of another module's parameter: these are written over."""

    def _read(self) -> Tensor:
        return self.layer.weight.detach().clone()

    def _write(self, value: Tensor) -> None:
        write_rows(self.layer, value)


class _Dequantised(MergedWeight):
    """Of a quantised layer, which has its parameter of its own class or a dense one."""

    def __init__(self, layer: Any, merged: Tensor) -> None:
        super().__init__(layer, nn.Parameter(merged, requires_grad=False))
        self._own_class = own_class(layer)

    def _read(self) -> Tensor:
        return self.layer.weight

    def _write(self, value: Tensor) -> None:
        device = self.layer.weight.device
        self.layer._parameters["weight"] = value  # type: ignore[assignment]
        become(self.layer, self._own_class if value is self._W0 else DequantisedLinear)
        if value.device != device:
            self.layer.to(device)  # each library moves its weights in its own way


@torch.no_grad()
def merged_weight(layer: LinearLike, merged: Tensor) -> MergedWeight:
    """W0 of a layer, in place, and `merged`, in the same layout; dense if W0 is quantised."""
    if is_quantised(layer):
        return _Dequantised(layer, merged)
    return (MergedWeight if has_own_weight(layer) else _MergedRows)(layer, merged)
