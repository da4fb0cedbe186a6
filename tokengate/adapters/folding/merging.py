"""The weight that computes what a layer and its modification do, and how far it is from that."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tokengate.adapters.folding.deciding import FoldedLayer
from tokengate.adapters.weights import all_finite
from tokengate.errors import TokenGateError
from tokengate.kernels.gated_sum import without_bias
from tokengate.kernels.precision import finest_dtype
from tokengate.layers.sliced_linear import take_off
from tokengate.linears.dequantised import compute_dtype, product_error
from tokengate.linears.experts import StackedLinear
from tokengate.linears.linear_like import in_layout, row_blocks
from tokengate.linears.quantised import is_quantised

# Columns of M's matrix that are computed at once.
_COLUMNS = 256


def merged_weights(
    decided: Mapping[str, FoldedLayer], layer: Any, safe: bool
) -> tuple[Tensor | None, dict[str, float]]:
    """`merged_weight_of` a layer, or stacked of the experts that are merged, and the errors.

    Args:
        decided: what to do with it, or with each of its experts, by name.
        layer: it.
        safe: as for `fold`.
    """
    merged = [at for at, each in enumerate(decided.values()) if each.action == "merged"]
    names = list(decided)
    if not merged:
        return None, {}
    if not isinstance(layer, StackedLinear):
        weight, error = merged_weight_of(names[0], layer, safe)
        return weight, {names[0]: error}
    gated: Any = layer
    weights, errors = [], {}
    with _constants():
        linears, modifications = layer.each(), gated.modification.each()
        for at in merged:
            linears[at].modification = modifications[at]
            weight, errors[names[at]] = merged_weight_of(names[at], linears[at], safe)
            weights.append(weight)
        stacked = torch.stack(weights)
    return stacked, errors


def merged_weight_of(name: str, layer: Any, safe: bool) -> tuple[Tensor, float]:
    """W0 + M's matrix, in W0's dtype and layout, and how far its outputs are from the layer's."""
    dtype = finest_dtype(layer.weight.device)
    with _constants():
        W0 = torch.cat([block.to(dtype) for block in row_blocks(layer)])
        training = layer.modification.training
        layer.modification.eval()
        try:
            matrix = _matrix(layer, W0)
            quantised = is_quantised(layer)
            total = (W0 + matrix).to(compute_dtype(layer) if quantised else layer.weight.dtype)
            if not all_finite(total):
                raise TokenGateError(
                    f"fold found a merged weight of {name!r} that is not finite: nothing was "
                    "folded; look for a modification that diverged."
                )
            x = torch.randn(
                64, W0.shape[1], dtype=dtype, generator=torch.Generator().manual_seed(0)
            ).to(W0.device)
            w = x @ W0.T
            found = x @ total.to(dtype).T
            error = _distance(found, w + _modification(layer, x, w))
            # Each entry is rounded to the dtype, which in the sum is no larger beside its norm.
            wrong = error > 4 * torch.finfo(total.dtype).eps
            if quantised:
                w = _own_product(layer, x.to(total.dtype)).to(dtype)
                error = _distance(found, w + _modification(layer, x, w))
                wrong = wrong or error > product_error(layer)
            weight = in_layout(layer, total)
        finally:
            layer.modification.train(training)
    if safe and wrong:
        raise TokenGateError(
            f"fold found that {name!r} with a merged weight of {total.dtype} differs from what it "
            f"computes now by {error:.2g} of its output: nothing was folded; pass safe=False "
            "to merge all the same."
        )
    return weight, error


@contextlib.contextmanager
def _constants() -> Iterator[None]:
    """Without gradients, though not of inference mode, whose tensors could never be trained."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _own_product(layer: Any, x: Tensor) -> Tensor:
    """W0 x as the library of a quantised layer computes it in evaluation."""
    # On a copy: bitsandbytes lays the weights out anew in the first evaluation.
    twin = copy.deepcopy(layer)
    take_off(twin)
    return without_bias(twin.eval()(x), twin.bias)


def _matrix(layer: Any, W0: Tensor) -> Tensor:
    """M's matrix, `(out_features, in_features)`: what M makes of the unit vectors."""
    in_features = W0.shape[1]
    matrix = torch.empty_like(W0)
    for start in range(0, in_features, _COLUMNS):
        stop = min(start + _COLUMNS, in_features)
        units = torch.zeros(stop - start, in_features, dtype=W0.dtype, device=W0.device)
        units[:, start:stop].fill_diagonal_(1)
        matrix[:, start:stop] = _modification(layer, units, W0[:, start:stop].T).T
    return matrix


def _modification(layer: Any, x: Tensor, w: Tensor) -> Tensor:
    factors = layer.modification.factors(x, w, layer)
    m: Tensor = layer.modification(x, w) if factors is None else factors.product(w)
    return m


def _distance(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    difference = (found - wanted).norm() / wanted.norm().clamp(min=1e-30)
    return float(difference)
