"""Numbers as powers of two times what is left, exactly, by comparisons and products alone.

`torch.frexp` gives the same, and is no operation of the graphs that ONNX has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Halves of float32's range of exponents, down to one: together they reach all of it.
_ALL = (64, 32, 16, 8, 4, 2, 1)


def power_of_two(size: Tensor, steps: Sequence[int] = _ALL) -> Tensor:
    """A power of two p for each number >= 0, `(...) -> (...)`: size / p is in [2^(1-s), 2^s).

    s is the last of `steps`, each of which is half of the one before. Beyond the sum of the steps,
    as of 0, subnormal and infinite numbers, p is the last that they reach; of a NaN it is 1.
    """
    power = torch.ones_like(size)
    for step in steps:
        small = torch.where(size < 2.0 ** (1 - step), 2.0**-step * power, power)
        # What is divided by a power of two is rounded only where it would be below all numbers.
        grown = torch.where(size >= 2.0**step, 2.0**step * power, small)
        size, power = size / (grown / power), grown
    return power


def bits(x: Tensor) -> Tensor:
    """`x.view(torch.int32).long()` of float32 numbers, `(...) -> (...)`; of a NaN that of one."""
    size = x.abs()
    least = 2.0**-126  # of the numbers that are not subnormal
    power = power_of_two(size.clamp(min=least))
    exponent = power.log2().round().long() + 127
    normal = (exponent << 23) + ((size / power - 1) * 2.0**23).long()
    found = torch.where(size < least, (size * 2.0**75 * 2.0**74).long(), normal)
    found = torch.where(size.isinf(), 255 << 23, found)
    found = torch.where(size.isnan(), 511 << 22, found)
    negative = (x < 0) | ((x == 0) & (1 / x < 0))
    return torch.where(negative, found - 2**31, found)
