"""A patched layer whose class someone else derives another of is given back under that one."""

import pytest
import torch
from models import away_from_initialisation
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tokengate


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_parametrized_after_it_was_patched(name):
    x = torch.randn(3, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    tokengate.patch(model, "all-linear", rank=2)
    getattr(parametrizations, name)(model[0])
    with tokengate.disabled(model):
        base = model(x)
    away_from_initialisation(model)
    assert (model(x) - base).abs().max() > 1e-3
    tokengate.unpatch(model)
    assert torch.equal(model(x), base)
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]).__name__ == "ParametrizedLinear"
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model(x), base)
