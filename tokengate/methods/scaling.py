"""The factor in front of a low-rank product, as papers and libraries give it."""

from __future__ import annotations

import math

from tokengate.arguments import finite, positive, switch
from tokengate.errors import TokenGateError


def scale_of(rank: int, scale: float | None, alpha: float | None, rslora: bool = False) -> float:
    """The factor itself, from `scale` or from `alpha`; 0.5 if neither is given.

    alpha / rank is LoRA's (Hu et al., 2022), alpha / sqrt(rank) is rsLoRA's (Kalajdzievski, 2023,
    arXiv 2312.03732), which keeps the size of the modification when the rank grows; 0.5 is what
    Tables 6-8 of the gate's paper use. A `scale` may be 0 or less, as one that was set later is in
    an adapter on disk; `build` refuses it of what is to be trained.
    """
    switch("rslora", rslora)
    if scale is not None and alpha is not None:
        raise TokenGateError(
            f"scale={scale!r} and alpha={alpha!r} were both given: pass one of them."
        )
    if alpha is not None:
        divisor, shown = (math.sqrt(rank), "sqrt(rank)") if rslora else (rank, "rank")
        return positive(f"alpha / {shown}", positive("alpha", alpha) / divisor)
    if rslora:
        raise TokenGateError(
            "rslora=True was given without alpha: it means scale = alpha / sqrt(rank), so pass "
            "alpha, and no scale."
        )
    return 0.5 if scale is None else finite("scale", scale)
