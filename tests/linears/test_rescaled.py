"""A BatchNorm that is fused into a patched layer would scale W0 x and not M(x): it is refused."""

import copy

import pytest
import torch
from models import away_from_initialisation, one_sentence
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import tokengate

X = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1))
LAYERS = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)),
    "linear": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)),
    "fused": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)),
}
FUSE = {"convolution": fuse_conv_bn_eval, "linear": fuse_linear_bn_eval}


def in_place(layer, norm):
    """As mmengine's `fuse_conv_bn` does it, and other ports of it."""
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    layer.weight = nn.Parameter(layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias = nn.Parameter((layer.bias - norm.running_mean) * factor + norm.bias)
    return layer


def made(kind, method="lora", trained=True, **options):
    torch.manual_seed(0)
    model = LAYERS[kind]().eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.1, 4)
    slices = {"slices": {"0": tokengate.Slices(q=4, v=4)}} if kind == "fused" else {}
    tokengate.patch(model, ["0.q"] if slices else ["0"], method=method, rank=2, **slices, **options)
    if trained:
        away_from_initialisation(model)
    return model, X if kind == "convolution" else X[..., 0, 0]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["torch's", "in place"])
def test_it_is_refused_and_nothing_has_changed(kind, method, how):
    model, x = made(kind, method)
    before = model(x)
    fuse = FUSE.get(kind, fuse_linear_bn_eval) if how == "torch's" else in_place
    with one_sentence("M(x)", "fuse before tokengate.patch", "tokengate.merge_and_unload"):
        fuse(model[0], model[1])
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_told_from_other_changes_in_all_dtypes(dtype):
    """Products are rounded; what is trained further or was quantised points elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64)).eval().to(dtype)
    model[1].running_var.uniform_(0.1, 4)
    away_from_initialisation(tokengate.patch(model, ["0"], rank=2))
    with one_sentence("M(x)"):
        fuse_linear_bn_eval(model[0], model[1])
    weight = model[0].weight.detach()
    for around in (0.005, 0.01, 0.02, 0.03, 0.04):
        other = weight + around * weight.std() * torch.randn(64, 16).to(dtype)
        model[0].weight = nn.Parameter(other, requires_grad=False)
        model[0].weight = nn.Parameter(weight, requires_grad=False)
    model[0].weight = nn.Parameter(weight.to(torch.float8_e4m3fn).to(dtype), requires_grad=False)


@pytest.mark.parametrize("kind", FUSE)
def test_what_it_names_does(kind):
    model, x = made(kind, gate=False)
    before = model(x)
    with tokengate.disabled(model):
        assert (model(x) - before).abs().max() > 0.1
    tokengate.merge_and_unload(model)
    fused = FUSE[kind](model[0], model[1])
    torch.testing.assert_close(fused(x), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
def test_a_new_modification_is_trained_beside_what_was_fused(method):
    model, x = made("linear", method, trained=False)
    before = model(x)
    fused = fuse_linear_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(x), before, rtol=0, atol=1e-5)


def test_other_weights_are_taken():
    """Whoever loads, casts, ties, quantises or copies says nothing of the layer's output."""
    model, x = made("linear")
    layer = model[0]
    other = nn.Linear(6, 8)
    given = {
        "other": other.weight,
        "cast": nn.Parameter(other.weight.detach().bfloat16()),
        "the same": nn.Parameter(other.weight.detach().clone()),
        "rounded": nn.Parameter((other.weight.detach() * 16).round() / 16),
        "not there": nn.Parameter(other.weight.detach().to("meta")),
        "there": nn.Parameter(other.weight.detach().clone() * 2),
        "of another shape": nn.Parameter(torch.ones(3, 6)),
        "of ones": nn.Parameter(torch.ones(8, 6)),
        "all of it": nn.Parameter(torch.ones(8, 6) / 2),
        "zeros": nn.Parameter(torch.zeros(8, 6)),
        "after zeros": nn.Parameter(torch.ones(8, 6)),
    }
    for weight in given.values():
        layer.weight = weight
        assert layer.weight is weight
    layer.weight = None
    layer.weight = other.weight
    state = copy.deepcopy(model.state_dict())
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        model.load_state_dict(nn.Module.state_dict(made("linear")[0]), assign=assign)
    copy.deepcopy(model).to(torch.float16).double()(x.double())
    owner = tokengate.patch(nn.Sequential(nn.Linear(1, 8)), ["0"], rank=1)
    away_from_initialisation(owner)
    owner[0].weight = nn.Parameter(torch.randn(8, 1))  # which has no direction to keep
