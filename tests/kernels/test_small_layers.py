"""How many operations a small layer starts on a CPU: each takes longer than its arithmetic."""

import pytest
import torch
from models import away_from_initialisation
from operations import Counter
from torch import nn

import tokengate


def counted(method, **options):
    """The operations of a step, and of inference, of a trained layer of 64 features."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    tokengate.patch(model, "all-linear", method, rank=8, **options)
    away_from_initialisation(model)
    x = torch.randn(4, 16, 64, requires_grad=True)
    if options.get("gate", True):
        tokengate.calibrate(model.eval(), [x.detach()], sparsity=0.5)
    model.train()(x).sum().backward()  # DoRA's magnitude is known to be trained from here on
    model.zero_grad()
    grad = torch.randn(4, 16, 64)
    with Counter() as training:
        model(x).backward(grad)
    model.eval()
    with Counter() as inference, torch.no_grad():
        model(x)
    return [each.names for each in (training, inference)]


# Of a step, and of inference: with a gate, and without.
MOST = {
    "lora": ((43, 19), (13, 5)),
    "adalora": ((47, 20), (17, 6)),
    "dora": ((71, 30), (39, 18)),
}


@pytest.mark.parametrize("method", MOST)
@pytest.mark.parametrize("gate", [True, False], ids=["gated", "ungated"])
def test_operations_of_a_small_layer(method, gate):
    found = counted(method, gate=gate)
    most = MOST[method][0 if gate else 1]
    print(method, gate, *map(len, found))
    for names, limit in zip(found, most, strict=True):
        assert "mm" in names
        assert len(names) <= limit, names


def test_dora_s_norms_of_a_small_weight_are_those_of_a_large_one(monkeypatch):
    layer = nn.Linear(24, 40)
    tokengate.patch(layer, "all-linear", "dora", rank=4)
    away_from_initialisation(layer)
    dora, own = layer.modification, layer.weight + 0.5 * layer.modification.B @ layer.modification.A
    small = dora.row_norms(layer)
    monkeypatch.setattr("tokengate.methods.dora._SMALL", 0)
    torch.testing.assert_close(dora.row_norms(layer), small)
    torch.testing.assert_close(small, own.detach().norm(dim=1))
    assert not small.requires_grad
