"""Exact powers of two, without `frexp`: over all of float32's and float64's range."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokengate.kernels.norms import norms, ratios
from tokengate.kernels.powers_of_two import bits, power_of_two


def raw(numbers):
    """float32 numbers from their bits."""
    return torch.tensor(numbers, dtype=torch.int64).to(torch.int32).view(torch.float32)


WORDS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64)


@settings(deadline=None)
@given(WORDS)
def test_bits_are_those_in_memory(words):
    x = raw(words)
    x = torch.where(x.isnan(), torch.nan, x)  # of which there is one
    assert torch.equal(bits(x), x.view(torch.int32).long())


@pytest.mark.parametrize("x", [0.0, -0.0, math.inf, -math.inf, 2**-149, 2**-126, 2**-127, 3.4e38])
def test_bits_at_the_ends(x):
    found = torch.tensor([x], dtype=torch.float32)
    assert torch.equal(bits(found), found.view(torch.int32).long())


@settings(deadline=None)
@given(WORDS, st.sampled_from([(64, 32, 16, 8, 4, 2, 1), (64, 32, 16)]))
def test_size_is_what_is_left_times_the_power(words, steps):
    size = raw(words).abs()
    size = size[size.isfinite()]
    power = power_of_two(size, steps)
    mantissa, _ = torch.frexp(power)
    assert (mantissa == 0.5).all()
    left = size / power
    assert torch.equal(left.double() * power.double(), size.double())
    usual = size >= 2.0**-111
    low, high = 2.0 ** (1 - steps[-1]), 2.0 ** steps[-1]
    assert ((left >= low) & (left < high))[usual].all()
    assert (left < high).all()


@settings(deadline=None)
@given(
    st.integers(-149, 127),
    st.integers(-149, 127),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_ratios_of_all_sizes(of_m, of_w, dtype, seed):
    """r where its squares leave float32's range, as float64 has it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(2, 3, 5, generator=generator) + 0.5
    m, w = (drawn * torch.tensor([2.0**of_m, 2.0**of_w]).view(2, 1, 1)).to(dtype)
    # As what is compiled or exported has it, which looks at no value.
    found = torch.func.vmap(lambda m, w: ratios(norms(m, torch.float32), norms(w, torch.float32)))
    exact = m.double().norm(dim=-1) / w.double().norm(dim=-1)
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 8
    seen = (exact > least) & (exact < most) & (m.double().norm(dim=-1) < math.inf)
    got = found(m, w).double()
    torch.testing.assert_close(got[seen], exact[seen], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_norms_of_float64(size):
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64) * size
    norm, power = norms(x, torch.float64)
    torch.testing.assert_close(norm * power, torch.tensor([5.0, 1.0], dtype=x.dtype) * size)
