"""The example's method, which stands for a user's own, beside the built-in ones."""

import importlib.util
import pathlib

import pytest
import torch
from models import Net, away_from_initialisation, snapshot
from torch.nn import functional as F

import tokengate
from tokengate.modifications import registry

pytest.importorskip("sklearn", reason="the examples extra is not installed")
FILE = pathlib.Path(__file__).parents[1] / "examples" / "custom_method.py"


@pytest.fixture
def vera(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    spec = importlib.util.spec_from_file_location("custom_method", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VeRA


def test_it_is_about_ten_lines():
    code = FILE.read_text().split('@tokengate.register("vera")')[1].split("\n\n\n")[0]
    lines = [line for line in code.splitlines() if line.strip() and "def " not in line]
    assert len(lines) <= 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_gated_and_taken_out_like_the_built_in_ones(vera, dtype):
    model = Net().to(dtype)
    x = torch.randn(2, 5, 8).to(dtype)
    base, before = model(x), snapshot(model)
    tokengate.patch(model, ["q_proj", "fc1"], "vera", rank=6, tau=0.1)
    assert torch.equal(model(x), base)
    m = model.blocks[0].q_proj.modification
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {"d": (6,), "b": (8,)}
    assert torch.equal(m.A, model.blocks[1].q_proj.modification.A)  # shared
    assert not any("modification.A" in name for name in model.state_dict())

    away_from_initialisation(model)
    layer = model.blocks[0].q_proj.requires_grad_(False)
    w = F.linear(x, layer.weight)
    wanted = (x.float() @ m.A.float().T * m.d.float()) @ m.B.float().T * m.b.float()
    open_ = wanted.norm(dim=-1) >= 0.1 * w.float().norm(dim=-1)
    with tokengate.record(layer, positions=True) as rec:
        h = layer(x)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        h.float(), w.float() + wanted * open_[..., None], rtol=tolerance, atol=tolerance
    )
    assert rec.report().modules[""].positions == 10
    model(x).float().sum().backward()
    assert model.blocks[1].q_proj.modification.d.grad.any()
    assert torch.equal(tokengate.unpatch(model)(x), base)
    assert snapshot(model)["values"] == before["values"]
