"""A vector, `(in_features,)`, is one position: as the same in a batch, and the base's layout."""

import pytest
import torch
from models import away_from_initialisation
from torch import nn

import tokengate

METHODS = ["lora", "dora", "adalora", "adapter"]
GATES = ["threshold", "firm", "fisher", "sigmoid", False]


def patched(method, gate, targets="all-linear"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4, bias=False))
    slices = None if targets == "all-linear" else {"0": tokengate.Slices(q=8, v=4)}
    tokengate.patch(model, targets, method, gate=gate, rank=2, slices=slices)
    away_from_initialisation(model)
    for layer in tokengate.layers(model).values():
        if gate == "firm":
            layer.gate.threshold.fill_(0.1)
        if gate == "sigmoid":
            nn.init.normal_(layer.gate.v)
    return model


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("targets", ["all-linear", ["0.q", "2"]], ids=["whole", "sliced"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_as_a_batch_of_one(method, gate, targets):
    model = patched(method, gate, targets)
    x = torch.randn(8, requires_grad=True)
    for training in (True, False):
        model.train(training)
        single, batch = model(x), model(x.unsqueeze(0)).squeeze(0)
        assert single.shape == (4,)
        with tokengate.disabled(model):
            assert not torch.allclose(single, model(x))
        torch.testing.assert_close(single, batch)
        single.square().sum().backward()
        found, of_x = gradients(model), x.grad.clone()
        x.grad = None
        batch.square().sum().backward()
        assert found
        torch.testing.assert_close((found, of_x), (gradients(model), x.grad))
        x.grad = None
    jacobian = torch.func.jacrev(model)(x)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(model, x))
    rows = torch.stack([x.detach(), -x.detach()])
    torch.testing.assert_close(torch.vmap(model)(rows), model(rows))


def test_it_is_counted_and_can_be_restricted():
    model = patched("lora", "threshold")
    x = torch.randn(8)
    with tokengate.record(model, positions=True) as rec:
        model(x)
    assert rec.report().modules["0"].positions == 1
    assert rec.positions["0"][0].numel() == 1
    with tokengate.restrict(model, lambda name, shape: torch.zeros(shape, dtype=torch.bool)):
        outside = model(x)
    with tokengate.disabled(model):
        assert torch.equal(outside, model(x))
