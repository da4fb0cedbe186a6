"""How many operations a layer starts on the path that a GPU takes; a Triton kernel is one."""

import pytest
import torch
from interpreted import kernels
from models import away_from_initialisation
from operations import Counter
from torch import nn

import tokengate
from tokengate.kernels import fused, fused_sum

__all__ = ["kernels"]

pytestmark = pytest.mark.usefixtures("kernels")


class Large(tokengate.Gate):
    """One that reads sizes, with their gradients."""

    def weights(self, positions):
        return torch.sigmoid(positions.r.clamp(max=9))


def layer_of(method, dtype=torch.float32, **options):
    model = nn.Sequential(nn.Linear(40, 48, bias=False)).to(dtype)
    tokengate.patch(model, "all-linear", method, rank=4, **options)
    return away_from_initialisation(model)


def counted(model, dtype=torch.float32):
    """The operations of forward and backward in training, and of inference."""
    model.zero_grad()
    x = torch.randn(1, 20, 40, dtype=dtype, requires_grad=True)
    grad = torch.randn(1, 20, 48, dtype=dtype)
    with Counter() as forward:
        h = model(x)
    with Counter() as backward:
        h.backward(grad)
    model.eval()
    with Counter() as inference, torch.no_grad():
        model(x)
    return [each.names for each in (forward, backward, inference)]


# The budget: forward, backward, inference.
BUDGET = {"lora": (8, 14, 6), "adalora": (9, 18, 6), "dora": (12, 24, 7), "adapter": (9, 15, 7)}
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"}


@pytest.mark.parametrize("method", BUDGET)
def test_the_budget(method):
    """With the gate open, then closed; with dropout three and two more; in 16 bits three more."""
    plain = counted(layer_of(method))
    closed = counted(layer_of(method, tau=1e4))
    dropped = counted(layer_of(method, dropout=0.1))
    narrow = counted(layer_of(method, torch.bfloat16), torch.bfloat16)
    print(method, *([len(names) for names in each] for each in (plain, closed, dropped, narrow)))
    assert closed == plain
    assert {"measure", "decide", "gated_sum"} <= set(plain[0]) & set(plain[2])
    assert {"weigh", "direct"} <= set(plain[1])
    assert "thin" in dropped[0]
    assert any("_to_copy" in names for names in narrow)
    for i, most in enumerate(BUDGET[method]):
        assert len(plain[i]) <= most, plain[i]
        assert len(dropped[i]) - len(plain[i]) <= (3, 2, 0)[i], dropped[i]
        assert len(narrow[i]) - len(plain[i]) <= 3, narrow[i]
        for found in (plain, dropped, narrow):
            assert not WAITS & set(found[i])


def test_one_more_is_seen(monkeypatch):
    quick = fused_sum.fused_sum
    plain = counted(layer_of("lora"))[0]
    monkeypatch.setattr(fused_sum, "fused_sum", lambda out, *args: quick(out + 0, *args))
    found = counted(layer_of("lora"))[0]
    assert sorted(found) == sorted([*plain, "add"])


@pytest.mark.parametrize("gate", [Large, "sigmoid"])
def test_other_gates_take_the_same_way(gate):
    found = counted(layer_of("lora", gate=gate))
    assert "gated_sum" in found[0]
    assert "weigh" in found[1]
    assert not any(WAITS & set(names) for names in found)


def test_dora_asks_nobody_whether_it_is_trained():
    model = nn.Sequential(nn.Linear(40, 48, bias=False))
    tokengate.patch(model, "all-linear", "dora", rank=4)
    before = counted(model)
    trained = counted(away_from_initialisation(model.train()))
    assert before == trained
    assert not any(WAITS & set(names) for names in before)
    state = model.state_dict()
    model.load_state_dict({"0.weight": state["0.weight"]}, strict=False)
    assert any(WAITS & set(names) for names in counted(model.train()))  # once, after the base's
    assert counted(model.train()) == before
    model.load_state_dict(state)
    assert counted(model.train()) == before


def test_elsewhere_pytorch_s_operations_do_it(monkeypatch):
    monkeypatch.undo()
    assert fused.kernels_for(torch.ones(1)) is None
    for names in counted(layer_of("lora")):
        assert not {"measure", "decide", "gated_sum", "weigh", "direct"} & set(names)
