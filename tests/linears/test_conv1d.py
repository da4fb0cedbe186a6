"""transformers' Conv1D, whose weight is transposed, under every method."""

import copy
import pickle

import pytest
import torch
from models import away_from_initialisation, snapshot
from torch import nn

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
from transformers.pytorch_utils import Conv1D  # noqa: E402

METHODS = ["lora", "dora", "adalora", "adapter"]


def twins(method, dtype=torch.float64, **options):
    """A Conv1D and a Linear with the same values, patched alike."""
    conv = Conv1D(5, 7).to(dtype)
    linear = nn.Linear(7, 5, dtype=dtype)
    with torch.no_grad():
        conv.weight.normal_()
        conv.bias.normal_()
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    layers = []
    for layer in (conv, linear):
        torch.manual_seed(3)
        model = nn.ModuleDict({"c_attn": layer})
        tokengate.patch(model, ["c_attn"], method, rank=3, tau=0.05, penalty=0.1, **options)
        away_from_initialisation(model, 0.7)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", [True, False], ids=["gated", "ungated"])
def test_it_is_the_linear_layer_of_its_transposed_weight(method, gate):
    results = []
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    for layer in twins(method, gate=gate):
        assert {n: tuple(p.shape) for n, p in layer.modification.named_parameters()}
        y = x.clone().requires_grad_()
        h = layer(y)
        h.sin().sum().backward()
        results.append([h, y.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert sum(bool(wanted.any()) for wanted in results[1]) >= len(results[1]) - 1
    for ours, wanted in zip(*results, strict=True):
        assert wanted.isfinite().all()
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_op_at_initialisation_and_given_back(method, dtype):
    model = nn.Sequential(Conv1D(6, 4)).to(dtype)
    x = torch.randn(2, 3, 4).to(dtype)
    base, before = model(x), snapshot(model)
    tokengate.patch(model, "all-linear", method, rank=2)
    assert isinstance(model[0], Conv1D)
    assert not isinstance(model[0], nn.Linear)
    assert list(tokengate.layers(model)) == ["0"]
    assert torch.equal(model(x), base)
    away_from_initialisation(model)
    changed = model(x)
    assert not torch.equal(changed, base)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), changed)
    tokengate.unpatch(model)
    assert torch.equal(model(x), base)
    assert snapshot(model) == before


def test_doras_norms_follow_the_weight():
    conv, linear = twins("dora")
    x = torch.randn(3, 7, dtype=torch.float64)
    before = conv(x)
    with torch.no_grad():
        conv.weight[:, 1].mul_(3)
        linear.weight[1].mul_(3)
    assert not torch.allclose(conv(x), before)
    torch.testing.assert_close(conv(x), linear(x))


def test_gpt2():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(1, 64, (2, 6))
    base = model(ids).logits
    tokengate.patch(model, ["attn.c_attn", "mlp.c_fc"], "dora", rank=4)
    assert len(tokengate.layers(model)) == 4
    assert torch.equal(model(ids).logits, base)
    tokengate.verify(model, ids)
    assert len(tokengate.layers(tokengate.patch(model, ["attn.c_proj"]))) == 6
