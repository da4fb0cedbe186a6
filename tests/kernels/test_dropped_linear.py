"""Dropout on the way down: which elements are dropped, and what is kept of it for backward."""

import pytest
import torch
from torch.nn import functional as F

from tokengate.kernels import dropped_linear as module
from tokengate.kernels.dropped_linear import dropped_linear


def factor_of(shape, dropout):
    """What each element of an input of `shape` is multiplied with: 0 or 1 / (1 - dropout)."""
    eye = torch.eye(shape[-1], dtype=torch.float64)
    return dropped_linear(torch.ones(shape, dtype=torch.float64), eye, dropout, True, eye.dtype)


@pytest.mark.parametrize("dropout", [1e-3, 0.05, 0.125, 0.126, 0.5, 0.9])
def test_the_share_that_is_dropped(dropout):
    """Within five standard deviations: overall, in each column and next to each other."""
    torch.manual_seed(0)
    rows, columns = 4000, 50
    dropped = factor_of((rows, columns), dropout) == 0
    for found, n in [
        (dropped.double().mean(), rows * columns),
        (dropped[:, 0].double().mean(), rows),
        (dropped[:, -1].double().mean(), rows),
    ]:
        assert abs(found - dropout) < 5 * (dropout * (1 - dropout) / n) ** 0.5
    pairs = (dropped[:, 1:] & dropped[:, :-1]).double().mean()
    both = dropout**2
    assert abs(pairs - both) < 7 * (both * (1 - both) / (rows * (columns - 1))) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_element_can_be_dropped(n):
    torch.manual_seed(0)
    counts = sum((factor_of((n,), 0.1) == 0).double() for _ in range(3000))
    assert ((counts - 300).abs() < 5 * (3000 * 0.09) ** 0.5).all()


def test_a_list_that_falls_short_is_gone_on_with(monkeypatch):
    """Once in a billion times the first draw does not reach the end."""
    plain = torch.rand
    sizes = []

    def short(size, **options):
        sizes.append(size)
        return plain(size, **options) * (1e-3 if len(sizes) == 1 else 1)

    torch.manual_seed(0)
    monkeypatch.setattr(torch, "rand", short)
    dropped = (factor_of((100, 100), 0.1) == 0).flatten()
    assert len(sizes) == 2
    assert dropped[:1000].all()  # distances of 1 at first
    assert abs(dropped[2000:].double().mean() - 0.1) < 0.02


def test_the_same_seed_drops_the_same():
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(factor_of((20, 30), 0.1))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dropout", [0.1, 0.5], ids=["listed", "mask"])
def test_kept_is_a_list_or_a_mask(dropout):
    x = torch.randn(300, 40, requires_grad=True)
    weight = torch.randn(3, 40, requires_grad=True)
    z = dropped_linear(x, weight, dropout, True, x.dtype)
    kept = z.grad_fn.saved_tensors[-1]
    assert kept.dtype == (torch.int64 if dropout <= module._LISTED else torch.bool)
    assert kept.nbytes <= x.numel()


@pytest.mark.parametrize("layout", ["whole", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_dropout_the_input_is_kept_as_it_is(layout, dtype):
    x, weight = torch.randn(4, 6, 8, dtype=dtype, requires_grad=True), torch.randn(3, 8)
    weight.requires_grad_()
    given = x.transpose(0, 1) if layout == "transposed" else x

    def kept(function):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
            function(given)
        own = {t.untyped_storage().data_ptr() for t in (x, weight)}
        return {t.numel() for t in saved if t.untyped_storage().data_ptr() not in own}

    assert kept(lambda x: dropped_linear(x, weight, 0.0, True, dtype)) == set()
    copies = layout == "transposed" or dtype == torch.bfloat16
    assert bool(kept(lambda x: F.linear(x, weight.to(dtype)))) == copies


@pytest.mark.parametrize("dropout", [0.1, 0.5], ids=["listed", "mask"])
def test_derivatives(dropout):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def f(x, weight):
        torch.manual_seed(1)
        return dropped_linear(x, weight, dropout, True, x.dtype)

    assert not torch.equal(f(x, weight), F.linear(x, weight))
    assert torch.autograd.gradcheck(f, (x, weight))
    assert torch.autograd.gradgradcheck(f, (x, weight))
