"""Sums of squares that leave no range: what is large, middling and small is summed apart.

Blue's way (1978): numbers beyond 2^50 are scaled by 2^-90, those below 2^-60 by 2^90, so that no
square of a float32 overflows or vanishes; a NaN is in the middle. Of three sums the largest that
is not 0 decides, with a part of the next.
"""

import triton
import triton.language as tl


@triton.jit
def add_squares(x, large, middle, small):
    """Add the squares of each row of x, `(R, C)`, to its three sums, `(R,)`."""
    size = tl.abs(x)
    is_large = size > 1125899906842624.0  # 2^50
    is_small = size < 8.673617379884035e-19  # 2^-60
    scaled_down = tl.where(is_large, x * 8.077935669463161e-28, 0.0)  # 2^-90
    scaled_up = tl.where(is_small, x * 1.2379400392853803e27, 0.0)
    other = tl.where(is_large | is_small, 0.0, x)
    large += tl.sum(scaled_down * scaled_down, 1)
    middle += tl.sum(other * other, 1)
    small += tl.sum(scaled_up * scaled_up, 1)
    return large, middle, small


@triton.jit
def root(large, middle, small):
    """n and e of the norm n 2^e; e is 90, 0 or -90."""
    # 2^-180 takes two steps: it is no float32.
    below_large = middle * 8.077935669463161e-28 * 8.077935669463161e-28
    below_middle = small * 8.077935669463161e-28 * 8.077935669463161e-28
    is_large = large > 0
    # A NaN is no less than anything.
    is_small = (middle == 0) & (small > 0) & (large == 0)
    square = tl.where(is_large, large + below_large, middle + below_middle)
    square = tl.where(is_small, small, square)
    exponent = tl.where(is_large, 90, tl.where(is_small, -90, 0))
    return tl.sqrt(square), exponent


@triton.jit
def times_two_to(x, exponent):
    """x 2^exponent, where that is a multiple of 90 from -180 to 180."""
    for _ in tl.static_range(2):
        x = tl.where(exponent > 0, x * 1.2379400392853803e27, x)
        x = tl.where(exponent < 0, x * 8.077935669463161e-28, x)
        exponent = tl.where(exponent > 0, exponent - 90, exponent)
        exponent = tl.where(exponent < 0, exponent + 90, exponent)
    return x
