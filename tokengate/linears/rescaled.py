"""A weight whose rows are scaled past M(x), as where a BatchNorm is fused into a patched layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.linears.linear_like import is_transposed
from tokengate.sharding import is_absent, local_part

# About so many rows tell; and from which difference of factors on they are scaled, not rounded.
_ROWS, _FAR = 64, 1e-2


def refuse_rescaled(
    layer: nn.Module, name: str, given: Tensor | None, modifications: Iterable[nn.Module]
) -> None:
    """An error if a patched layer is given its own weight with its rows scaled by various factors.

    Whoever does so means its output, and reads in its weight what that is. A modification that
    still has a part of zeros, as a new one, changes nothing yet, and is trained beside what it is
    given.
    """
    own = layer._parameters.get(name)
    if name != "weight" or own is None or given is None or not _is_rescaled(layer, own, given):
        return
    if any(all(bool(local_part(p.detach()).any()) for p in m.parameters()) for m in modifications):
        raise TokenGateError(
            f"the weight of a patched {layer._own_class.__name__} was to have its rows scaled, as "  # type: ignore[union-attr]
            "fuse_conv_bn_eval does, and M(x), which is beside it, would not be: fuse before "
            "tokengate.patch, or call tokengate.merge_and_unload first."
        )


@torch.no_grad()
def _is_rescaled(layer: nn.Module, own: Tensor, given: Tensor) -> bool:
    plain = all(type(each) in (Tensor, nn.Parameter) and not each.is_meta for each in (own, given))
    if not plain or own.shape != given.shape or is_absent(own):
        return False
    if not (own.is_floating_point() and given.is_floating_point()):
        return False
    before, after = (_some_rows(layer, each) for each in (own, given))
    if before.shape[1] == 1:  # which has no direction
        return False
    some = before.any(-1)
    if not some.any():
        return False
    before, after = before[some], after[some]
    factors = torch.linalg.vecdot(before, after) / before.square().sum(-1)
    # Half of it is what a product is rounded by at most, and half what a cast is.
    rounding = max(torch.finfo(each.dtype).eps for each in (own, given))
    off = (after - factors.unsqueeze(-1) * before).norm() > rounding * after.norm()
    return not off and bool(factors.max() - factors.min() > _FAR)


def _some_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    rows = weight.T if is_transposed(layer) else weight.flatten(1)
    return rows[:: max(1, len(rows) // _ROWS)].cpu().double()
