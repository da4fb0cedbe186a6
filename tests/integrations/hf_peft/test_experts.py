"""LoRA on experts' 3-D parameters is PEFT's `target_parameters`, in outputs and gradients."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft", "0.20")
pytest.importorskip("transformers", "5.20", reason="has the experts interface")

import test_mixtures as mixtures  # noqa: E402

import tokengate  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def theirs(model, targets, rank=4, alpha=8):
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=[], target_parameters=list(targets)
    )
    return peft.get_peft_model(copy.deepcopy(model), config)


def wrappers(model):
    """PEFT's, by the names of our layers."""
    return {
        f"{name.replace('.base_layer', '').removeprefix('base_model.model.')}."
        f"{module.parameter_name}": module
        for name, module in model.named_modules()
        if type(module).__name__ == "ParamWrapper"
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_equal_outputs_and_gradients(family, implementation):
    model, targets, _ = mixtures.build(family)
    exact = implementation == "eager"  # PyTorch's grouped_mm takes no doubles
    model.to(torch.float64 if exact else torch.float32)
    base = mixtures.run(model, implementation)
    other = theirs(model, targets).to(base.dtype)
    tokengate.patch(model, targets, rank=4, alpha=8, gate=False)
    layers, wrapped = tokengate.layers(model), wrappers(other)
    assert layers.keys() == wrapped.keys()
    experts, rank = 4, 4
    for name, layer in layers.items():
        A, B = (getattr(wrapped[name], f"lora_{part}")["default"].weight for part in "AB")
        torch.nn.init.normal_(B, std=0.1)
        own = layer.modification
        own.A.data = A.detach().reshape(experts, rank, -1).clone()
        own.B.data = B.detach().reshape(-1, rank, experts).permute(2, 0, 1).clone()
    found = mixtures.run(model, implementation)
    wanted = mixtures.run(other, implementation)
    assert (found - base).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    # As small as 1e-8.
    limits = {"rtol": 1e-6, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-6}
    scale = 1 / found.numel()
    for output in (found, wanted):
        (scale * output.square().sum()).backward()
    for name, layer in layers.items():
        A, B = (getattr(wrapped[name], f"lora_{part}")["default"].weight.grad for part in "AB")
        own = layer.modification
        assert own.A.grad.abs().max() > 1e-8
        torch.testing.assert_close(own.A.grad.flatten(0, 1), A, **limits)
        theirs_B = B.reshape(-1, rank, experts).permute(2, 0, 1)
        torch.testing.assert_close(own.B.grad, theirs_B, **limits)
