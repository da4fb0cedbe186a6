"""`tokengate.count`: one line that says what is trained."""

import pytest
import torch
from models import Net
from torch import nn

import tokengate
from tokengate import TokenGateError


def test_the_line():
    model = nn.Sequential(nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 4))
    base = 100 * 50 + 50 + 50 * 4 + 4
    assert str(tokengate.count(model)) == (
        "trainable params: 5,254 || all params: 5,254 || trainable%: 100.0000 || "
        "modifications: 0, gates: 0, others: 5,254"
    )
    tokengate.patch(model, ["0"], rank=2, train=["2"])
    found = tokengate.count(model)
    assert found.trainable == 2 * 150 + 1 + 204
    assert found.total == base + 301
    assert (found.modifications, found.gates, found.others) == (300, 1, 204)
    assert str(found) == (
        "trainable params: 505 || all params: 5,555 || trainable%: 9.0909 || "
        "modifications: 300, gates: 1, others: 204"
    )


def test_each_parameter_once_and_those_at_rest_not(tmp_path):
    model = tokengate.patch(Net(), ["q_proj"], rank=2, gate="sigmoid")
    one = tokengate.count(model)
    assert (one.modifications, one.gates) == (2 * 2 * 16, 2 * 9)
    tokengate.save(model, tmp_path)
    tokengate.load(model, tmp_path, name="b")
    two = tokengate.count(model)
    assert two.total == one.total + one.trainable
    assert (two.modifications, two.gates) == (one.modifications, one.gates)
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert tokengate.count(tied).total == 9
    assert str(tokengate.count(nn.ReLU())).startswith(
        "trainable params: 0 || all params: 0 || trainable%: 0.0000"
    )
    with pytest.raises(TokenGateError, match="count was given a int: pass a torch"):
        tokengate.count(3)


def test_four_bits_are_counted_as_what_they_stand_for():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the test extra is not installed")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
    model = nn.Sequential(layer).to("cpu")
    assert model[0].weight.numel() in (64 * 16, 64 * 32)
    assert tokengate.count(model).total == 64 * 32


def test_it_begins_as_pefts_own_line_does(capsys):
    """Of the same adapter: people, and what reads logs, look for these words."""
    peft = pytest.importorskip("peft", reason="the test extra is not installed")
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    theirs.print_trainable_parameters()
    line = capsys.readouterr().out.strip()
    ours = tokengate.patch(Net(), ["q_proj", "v_proj"], rank=4, gate=False)
    assert line
    assert str(tokengate.count(ours)).startswith(f"{line} || ")
