"""The example's method, which stands for a user's own, beside the built-in ones."""

import copy
import importlib.util

import pytest
import torch
from models import Net, away_from_initialisation, snapshot
from places import EXAMPLES
from torch.nn import functional as F

import tokengate
from tokengate.methods import registry

pytest.importorskip("sklearn", reason="the examples extra is not installed")
FILE = EXAMPLES / "custom_method.py"


@pytest.fixture
def vera(monkeypatch):
    monkeypatch.setattr(registry.METHODS, "kinds", dict(registry.METHODS.kinds))
    spec = importlib.util.spec_from_file_location("custom_method", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VeRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_gated_and_taken_out_like_the_built_in_ones(vera, dtype):
    model = Net().to(dtype)
    x = torch.randn(2, 5, 8).to(dtype)
    base, before = model(x), snapshot(model)
    tokengate.patch(model, ["q_proj", "fc1"], "vera", rank=6, tau=0.1)
    assert torch.equal(model(x), base)
    m = model.blocks[0].q_proj.modification
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {"d": (6,), "b": (8,)}
    assert m.A.data_ptr() == model.blocks[1].q_proj.modification.A.data_ptr()  # shared
    assert not torch.equal(m.A[:6, :6], m.B[:6, :6])
    assert not any("modification.A" in name for name in model.state_dict())

    away_from_initialisation(model)
    layer = model.blocks[0].q_proj
    w = F.linear(x, layer.weight).double()
    m64 = (x.double() @ m.A.double().T * m.d.double()) @ m.B.double().T * m.b.double()
    ratio = m64.norm(dim=-1) / w.norm(dim=-1)
    with torch.no_grad():
        layer.gate.tau.fill_(ratio.flatten().sort().values[3:5].mean())
    with tokengate.record(layer, positions=True) as rec:
        h = layer(x)
    opened = rec.positions[""][0]
    assert opened.sum() == 6
    assert rec.report().modules[""].positions == 10
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    wanted = w + m64 * opened[..., None]
    torch.testing.assert_close(h.double(), wanted, rtol=tolerance, atol=tolerance)
    model(x).float().sum().backward()
    for patched in tokengate.layers(model).values():
        assert all(p.grad.any() for p in patched.modification.parameters())
    assert torch.equal(tokengate.unpatch(model)(x), base)
    assert snapshot(model)["values"] == before["values"]


def test_it_is_saved_and_loaded(vera, tmp_path):
    base = Net()
    model = tokengate.patch(copy.deepcopy(base), ["q_proj"], "vera", rank=6)
    away_from_initialisation(model)
    tokengate.save(model, tmp_path)
    other = copy.deepcopy(base)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(other(x), model(x))
    tokengate.load(other, tmp_path)
    assert torch.equal(other(x), model(x))
