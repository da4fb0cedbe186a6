"""The options of every method: what they start with, and what they refuse."""

import math

import pytest
import torch
from torch import nn

import tokengate

METHODS = ["lora", "dora", "adalora", "adapter"]


def test_initial_values_and_scale():
    m = tokengate.patch(nn.Linear(400, 10), "all-linear", rank=100, alpha=20).modification
    assert m.scale == pytest.approx(0.2)
    assert m.A.shape == (100, 400)
    assert m.B.shape == (10, 100)
    # kaiming-uniform with a = sqrt 5 is uniform in +-1/sqrt(k)
    assert m.A.abs().max().item() == pytest.approx(1 / 20, rel=1e-3)
    assert m.A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert not m.B.any()

    layer = tokengate.patch(nn.Linear(400, 10), "all-linear", "dora", rank=100)
    m = layer.modification
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {
        "A": (100, 400), "B": (10, 100), "magnitude": (10,)
    }  # fmt: skip
    assert m.A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    torch.testing.assert_close(m.magnitude.detach(), layer.weight.norm(dim=1))

    m = tokengate.patch(
        nn.Linear(400, 300), "all-linear", "adalora", rank=50, alpha=20
    ).modification
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {
        "P": (300, 50), "E": (50,), "Q": (50, 400)
    }  # fmt: skip
    assert m.P.std().item() == pytest.approx(0.02, rel=0.03)
    assert m.Q.std().item() == pytest.approx(0.02, rel=0.03)
    assert not m.E.any()
    assert (m.scale, m.target_rank) == (pytest.approx(0.4), 25)

    m = tokengate.patch(nn.Linear(400, 10), "all-linear", "adapter").modification
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {"D": (32, 400), "U": (10, 32)}
    assert m.D.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert not m.U.any()
    assert m.activation == "relu"

    for method in METHODS:
        assert tokengate.patch(nn.Linear(3, 3), "all-linear", method).modification.scale == 0.5


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_rslora(method):
    layer = tokengate.patch(nn.Linear(8, 8), "all-linear", method, rank=4, alpha=6, rslora=True)
    assert layer.modification.scale == pytest.approx(3.0)
    layer = tokengate.patch(nn.Linear(8, 8), "all-linear", method, rank=4, alpha=6)
    assert layer.modification.scale == pytest.approx(1.5)


COMMON = [
    ({"rank": -1}, "rank=-1 is not a whole number >= 1"),
    ({"rank": 0}, "rank=0 is not"),
    ({"rank": 2.5}, "rank=2.5 is not"),
    ({"rank": True}, "rank=True is not"),
    ({"scale": math.nan}, "scale=nan is not a finite number"),
    ({"scale": 0.0}, "scale=0.0 is not above 0"),
    ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
    ({"dropout": -0.1}, r"dropout=-0.1 is not in"),
]
ALPHA = [
    ({"alpha": math.inf}, "alpha=inf is not a finite number"),
    ({"scale": 1.0, "alpha": 8}, "scale=1.0 and alpha=8 were both given"),
]
RSLORA = [
    ({"rslora": True}, "rslora=True was given without alpha"),
    ({"rslora": True, "scale": 1.0}, "rslora=True was given without alpha"),
    ({"rslora": 1, "alpha": 8}, "rslora=1 is neither True nor False"),
]
OF_LORA = "rank, scale, alpha, dropout, rslora"
OWN = {
    "lora": [*ALPHA, *RSLORA, ({"rnak": 8}, f"unknown option 'rnak' for LoRA.*{OF_LORA}")],
    "dora": [*ALPHA, *RSLORA, ({"rnak": 8}, f"unknown option 'rnak' for DoRA.*{OF_LORA}")],
    "adalora": [
        *ALPHA,
        ({"rank": 4, "target_rank": 5}, "target_rank=5 is above rank=4"),
        ({"target_rank": -1}, "target_rank=-1 is not a whole number >= 0"),
        ({"target_rank": 1.5}, "target_rank=1.5 is not"),
        ({"rslora": True}, "'rslora' for AdaLoRA.* rank, target_rank, scale, alpha, dropout"),
    ],
    "adapter": [
        ({"scale": None}, "scale=None is not a finite number"),
        ({"activation": "swish"}, "'swish' is unknown: choose one of relu, gelu, silu, tanh"),
        ({"activation": None}, "activation=None is unknown"),
        ({"alpha": 8}, "'alpha' for Adapter.* rank, scale, activation, dropout"),
    ],
}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [(method, *case) for method in METHODS for case in (*COMMON, *OWN[method])],
)
def test_bad_options(method, options, message):
    layer = nn.Linear(3, 3)
    with pytest.raises(tokengate.TokenGateError, match=message) as error:
        tokengate.patch(layer, "all-linear", method, **options)
    assert str(error.value).endswith(".")
    assert type(layer) is nn.Linear
    assert layer.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": math.nan}, "tau=nan is not a finite number"),
        ({"penalty": -1e-5}, "penalty=-1e-05 is negative"),
        ({"penalty": math.inf}, "penalty=inf is not a finite number"),
    ],
)
def test_bad_options_of_the_gate(options, message):
    layer = nn.Linear(3, 3)
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.patch(layer, "all-linear", **options)
    assert type(layer) is nn.Linear
