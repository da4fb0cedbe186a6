"""What earlier versions saved loads, and computes what it did when it was saved.

`tests/data/adapter_0_1` was written by 0.1 before its files were put into wings: an adapter of
every method and of a slice, each gated, with the outputs of the model it was saved from.
"""

import copy
import json
import pathlib
import pickle

import pytest
import torch
from torch import nn

import tokengate

FOLDER = pathlib.Path(__file__).parents[1] / "data" / "adapter_0_1"


def ramp(*shape):
    return (torch.arange(torch.Size(shape).numel()).float().reshape(shape) * 0.37).sin()


def base():
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)], nn.Linear(6, 12)).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(ramp(*parameter.shape) / (1 + i % 3))
    return model


@pytest.fixture(params=["loaded", "copied", "pickled"])
def model(request):
    model = base()
    tokengate.load(model, FOLDER)
    if request.param == "copied":
        return copy.deepcopy(model)
    return pickle.loads(pickle.dumps(model)) if request.param == "pickled" else model


def test_it_computes_what_it_did(model):
    saved = json.loads((FOLDER / "outputs.json").read_text())
    x = ramp(3, 5, 6)
    with torch.no_grad(), tokengate.record(model) as rec:
        found = model(x)
    wanted = torch.tensor(saved["outputs"])
    assert (base()(x) - wanted).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert {n: m.modified for n, m in rec.report().modules.items()} == saved["modified"]
    assert sorted(model.state_dict()) == saved["state_dict"]


def test_saved_again_it_has_the_same_names(tmp_path):
    model = base()
    tokengate.load(model, FOLDER)
    tokengate.save(model, tmp_path)
    old = json.loads((FOLDER / "adapter_config.json").read_text())
    new = json.loads((tmp_path / "tokengate_config.json").read_text())
    assert old["tensors"] == new["tensors"]
    assert old["layers"].keys() == new["layers"].keys()
