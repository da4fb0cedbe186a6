"""torch's encoder layers, whose inference fast path must not pass a patched layer by."""

import inspect

import pytest
import torch
from models import away_from_initialisation, snapshot
from torch import nn

import tokengate
from tokengate.linears.class_swap import Swapped, swap_back

TARGETS = ["linear1", "linear2"]


def encoder(nested=True, **options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


# Of torch's own nested tensors, which the fast path makes.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "frozen"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("targets", [TARGETS, ["layers.1.linear1"]], ids=["all", "second"])
def test_a_patched_layer_is_reached_in_evaluation(gradients, padded, targets):
    model = encoder().requires_grad_(False)
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None] if padded else None
    with torch.set_grad_enabled(gradients):
        base = model(x, src_key_padding_mask=mask)
        before = snapshot(model)
        tokengate.patch(model, targets)
        real = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
        # Not by the same kernel, and the fast path sets padded positions to 0.
        torch.testing.assert_close(
            model(x, src_key_padding_mask=mask)[real], base[real], rtol=1e-5, atol=1e-5
        )
        with tokengate.record(model) as rec:
            model(x, src_key_padding_mask=mask)
        assert {m.positions for m in rec.report().modules.values()} == {int(real.sum())}
        away_from_initialisation(model)
        assert not torch.allclose(model(x, src_key_padding_mask=mask)[real], base[real], atol=0.01)
        with tokengate.disabled(model):
            assert torch.equal(model(x, src_key_padding_mask=mask), base)
            with tokengate.disabled(model):
                assert torch.equal(model(x, src_key_padding_mask=mask), base)
            assert torch.equal(model(x, src_key_padding_mask=mask), base)
        assert not torch.allclose(model(x, src_key_padding_mask=mask)[real], base[real], atol=0.01)
        tokengate.unpatch(model)
        assert torch.equal(model(x, src_key_padding_mask=mask), base)
    assert snapshot(model) == before


def test_the_fast_path_would_pass_it_by():
    model = tokengate.patch(encoder(), TARGETS)
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            while isinstance(module, Swapped):
                swap_back(module)
    with tokengate.record(model) as rec, torch.no_grad():
        model(torch.randn(3, 5, 16))
    with pytest.raises(tokengate.TokenGateError, match="nothing was recorded"):
        rec.report()


def test_an_encoder_without_a_patched_layer_keeps_its_fast_path():
    model = nn.ModuleDict({"a": encoder(), "b": encoder(), "c": nn.Linear(2, 2)})
    tokengate.patch(model, ["a.layers.0.linear1"])
    flags = {n: m.activation_relu_or_gelu for n, m in model.named_modules() if
             isinstance(m, nn.TransformerEncoderLayer)}  # fmt: skip
    assert flags == {"a.layers.0": 0, "a.layers.1": 1, "b.layers.0": 1, "b.layers.1": 1}
    assert (model["a"].use_nested_tensor, model["b"].use_nested_tensor) == (False, True)
    tokengate.verify(model["a"], torch.randn(2, 3, 16))


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.functional.silu])
def test_every_activation_is_the_same_as_in_training(activation):
    model = encoder(nested=False, dropout=0.0, activation=activation)
    away_from_initialisation(tokengate.patch(model, TARGETS))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        evaluated = model(x)
    torch.testing.assert_close(evaluated, model.train()(x).detach())


def test_a_user_may_still_set_the_flags():
    model = tokengate.patch(encoder(), TARGETS)
    model.use_nested_tensor = False
    model.layers[0].activation_relu_or_gelu = 0
    tokengate.unpatch(model)
    assert model.use_nested_tensor is False
    assert model.layers[0].activation_relu_or_gelu == 0
    assert model.layers[1].activation_relu_or_gelu == 1


def test_only_what_it_has_is_an_attribute():
    model = tokengate.patch(encoder(), TARGETS)
    assert hasattr(model, "use_nested_tensor")
    assert not hasattr(model, "activation_relu_or_gelu")
    assert hasattr(model.layers[0], "activation_relu_or_gelu")
    assert not hasattr(model.layers[0], "use_nested_tensor")
    assert dict(inspect.getmembers(model.layers[0]))["linear1"] is model.layers[0].linear1
