"""Norms of vectors, one for each position: sizes that neither overflow nor underflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tokengate.kernels.eager import is_eager
from tokengate.kernels.powers_of_two import power_of_two

# Of positions: see `norms`.
Norms: TypeAlias = tuple[Tensor, Tensor | float]
# By these, see `power_of_two`, every number comes so near to 1 that its square is in range.
_STEPS, _WIDE = (64, 32, 16), (512, 256, 128)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """What norms, mu and g are summed in: float32, or float64 if any tensor is float64."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def norms(x: Tensor, dtype: torch.dtype, eager: bool = False) -> Norms:
    """`(..., C) -> (...), (...)`: n, summed in `dtype`, and p, powers of two or 1; ||x_i|| = n p.

    The squares of bfloat16 and float32 numbers beyond 1e19 or below 1e-23 leave float32's range.
    Where such numbers can matter, each position is first scaled by a power of two, which is exact.
    To know whether they do, values are looked at, if x `is_eager`, as who has asked may say.
    """
    if x.dtype == torch.float16 or x.numel() == 0:  # its squares fit float32
        return plain_norms(x, dtype)
    # Elsewhere to look at values would be to wait for them.
    if x.device.type == "cpu" and x.dtype != torch.float64 and (eager or is_eager(x)):
        found = plain_norms(x, dtype)
        if in_range(found) or not x.any():  # as M(x) is before it is trained
            return found
    size = x.abs().amax(-1).to(dtype)
    power = power_of_two(size, _WIDE if x.dtype == torch.float64 else _STEPS)
    scaled = x * (1 / power).to(x.dtype).unsqueeze(-1)
    return torch.linalg.vector_norm(scaled, dim=-1, dtype=dtype), power


def plain_norms(x: Tensor, dtype: torch.dtype) -> Norms:
    """The same where no square leaves the range of `dtype`."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype), 1.0


def in_range(norms: Norms) -> bool:
    """Whether no square that matters has left float32's range on the way to these plain norms."""
    least, largest = norms[0].aminmax()  # both are NaN where one number is
    return least.item() > 1e-15 and largest.item() < 1e18


def ratios(of_m: Norms, of_w: Norms) -> Tensor:
    """r = ||m_i|| / ||w_i|| of eq. 4, `(...)`, from the norms of m and of w.

    Infinite where no tau closes the gate: where w_i = 0, and where `m_i` has a NaN.
    """
    (m_norm, m_power), (w_norm, w_power) = of_m, of_w
    none = w_norm == 0
    found = times(m_norm, m_power / w_power) / torch.where(none, 1, w_norm)
    return torch.where(none | found.isnan(), torch.inf, found)


def opened(of_m: Norms, of_w: Norms, tau: Tensor) -> Tensor:
    """S of eq. 4 as booleans, `(...)`, from the norms of m and of w; tau is one or `(...)`."""
    (m_norm, m_power), (w_norm, w_power) = of_m, of_w
    tau = (tau.reshape(()) if tau.dim() > w_norm.dim() else tau).to(w_norm.dtype)
    # The negation, not >=: a comparison with NaN is false, which leaves the gate open.
    return ~(times(m_norm, m_power / w_power) < tau * w_norm)


def times(norm: Tensor, power: Tensor | float) -> Tensor:
    """n p of `norms`, `(...)`."""
    return norm * power if isinstance(power, Tensor) else norm


def reshaped(of_x: Norms, reshape: Callable[[Tensor], Tensor]) -> Norms:
    """The same norms in another shape."""
    norm, power = of_x
    return reshape(norm), reshape(power) if isinstance(power, Tensor) else power
