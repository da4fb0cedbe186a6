"""A patched layer whose class is another's: derived of it since, or with a way to be copied."""

import copy
import pickle
import threading

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


class Locked(nn.Linear):
    """A layer with something that no copy can have, which it says itself."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copied_as_its_own_class_says(copied):
    model, x = away_from_initialisation(tokengate.patch(Locked(8, 4), "all-linear")), torch.ones(8)
    wanted = model(x)
    other = copied(model)
    assert other.lock is not model.lock
    assert torch.equal(other(x), wanted)
    assert type(tokengate.unpatch(other)) is Locked
