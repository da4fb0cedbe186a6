"""`nn.Conv2d` under LoRA, DoRA and AdaLoRA, without gates, beside Hugging Face PEFT's."""

import copy

import pytest
import torch
from torch import nn

import tokengate
from tokengate.integrations import hf_peft

pytest.importorskip("transformers", reason="the transformers extra is not installed")
peft = pytest.importorskip("peft", reason="the test extra is not installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"
)

# Kernel, stride, padding, groups: what PEFT's A takes over, which has no dilation and zeros around.
SHAPES = [
    ((1, 1), 1, 0, 1),
    ((3, 3), 1, 1, 1),
    ((3, 2), (2, 1), (1, 0), 1),
    ((3, 3), 1, "same", 1),
    ((5, 3), 2, "valid", 1),
    ((3, 3), 1, 1, 2),
    ((2, 2), 2, 0, 4),
]


def theirs(model, method, rank):
    if method == "adalora":
        config = peft.AdaLoraConfig(
            target_modules=["conv"], init_r=rank, target_r=rank, lora_alpha=6, total_step=10
        )
    else:
        config = peft.LoraConfig(
            target_modules=["conv"], r=rank, lora_alpha=6, use_dora=method == "dora"
        )
    return peft.get_peft_model(model, config)


def values(layer, method):
    """The parameters of PEFT's layer by our names, and how they are laid out there."""
    own = {"A": layer.lora_A["default"], "B": layer.lora_B["default"]}
    if method == "adalora":
        return {"Q": own["A"], "P": own["B"], "E": layer.lora_E["default"]}
    own = {name: each.weight for name, each in own.items()}
    if method == "dora":
        own["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return own


# PEFT's DoRA mixes the rows of a grouped weight, and its AdaLoRA refuses one.
CASES = [("lora", shape) for shape in SHAPES]
CASES += [(method, shape) for method in ("dora", "adalora") for shape in SHAPES if shape[3] == 1]


@pytest.mark.parametrize(("method", "shape"), CASES, ids=str)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_outputs_and_gradients_are_pefts(shape, method, dtype, close):
    kernel, stride, padding, groups = shape
    base = nn.Sequential()
    base.add_module("conv", nn.Conv2d(4, 8, kernel, stride, padding, groups=groups, dtype=dtype))
    x = torch.randn(2, 4, 9, 8, dtype=dtype)
    ours = copy.deepcopy(base)
    scale = 6 / 4
    if method == "adalora":
        scale = 6 / (4 + 1e-5)
    tokengate.patch(ours, ["conv"], method, rank=4, scale=scale, gate=False)
    other = theirs(copy.deepcopy(base), method, 4).to(dtype)
    beside = values(other.base_model.model.conv, method)
    assert torch.equal(other(x), base(x))
    assert torch.equal(ours(x), base(x))
    modification = ours.conv.modification
    with torch.no_grad():
        for name, value in beside.items():
            if name != "magnitude":
                value.normal_(std=0.3)
            else:
                torch.testing.assert_close(value.flatten(), modification.magnitude)
                value += 0.1 * torch.rand_like(value)
            own = getattr(modification, name)
            assert own.numel() == value.numel()
            own.copy_(value.reshape(own.shape))
    results = []
    for model in (ours, other):
        y = x.clone().requires_grad_()
        h = model(y)
        h.sin().mean().backward()
        results.append([h, y.grad])
    assert not torch.allclose(results[0][0], base(x), atol=1e-3)
    for name, value in beside.items():
        results[0].append(getattr(modification, name).grad)
        results[1].append(value.grad.reshape(results[0][-1].shape))
    for found, wanted in zip(*results, strict=True):
        assert wanted.any()
        torch.testing.assert_close(found, wanted, rtol=close, atol=close)


@pytest.mark.parametrize(("method", "shape"), [CASES[2], CASES[5], CASES[8], CASES[13]], ids=str)
def test_adapters_go_in_and_out(method, shape, tmp_path):
    kernel, stride, padding, groups = shape
    base = nn.Sequential()
    base.add_module("conv", nn.Conv2d(4, 8, kernel, stride, padding, groups=groups))
    x = torch.randn(2, 4, 9, 8)
    other = theirs(copy.deepcopy(base), method, 4)
    with torch.no_grad():
        for value in values(other.base_model.model.conv, method).values():
            value += 0.3 * torch.rand_like(value)
    wanted = other(x)
    assert not torch.allclose(wanted, base(x), atol=1e-3)
    other.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    hf_peft.import_peft(ours, tmp_path / "theirs", gate=False)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-5, atol=1e-5)
    hf_peft.export_peft(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(again(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {"dilation": 2}), ("lora", {"padding_mode": "reflect"}), ("dora", {"groups": 2})],
)
def test_what_peft_computes_otherwise_is_not_exported(method, options, tmp_path):
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3, padding=1, **options)})
    tokengate.patch(model, ["conv"], method, rank=2, gate=False)
    with pytest.raises(tokengate.TokenGateError, match=r"'conv', which is a.* convolution"):
        hf_peft.export_peft(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
