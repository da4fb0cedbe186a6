"""Models of convolutions: timm's ConvNeXt, and diffusers' UNet and autoencoder."""

import pytest
import torch
from models import away_from_initialisation
from torch import nn

import tokengate

timm = pytest.importorskip("timm", reason="the timm extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the test extra is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")


def convnext(**options):
    model = timm.create_model(
        "convnext_atto", depths=(1,) * 4, dims=(8,) * 4, num_classes=3, ls_init_value=1.0, **options
    )
    return model, (torch.randn(2, 3, 32, 32),)


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2,
    )  # fmt: skip
    return model, (torch.randn(2, 4, 8, 8), torch.ones(2), torch.randn(2, 5, 12))


def vae():
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, (torch.randn(2, 3, 8, 8),)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def is_one_group(name, module):
    return isinstance(module, nn.Conv2d) and module.groups == 1


CASES = [
    (lambda: convnext(conv_mlp=True), ["mlp.fc1", "mlp.fc2"]),  # 1x1
    (lambda: convnext(), is_one_group),  # stem and downsampling, of stride 4 and 2
    (lambda: convnext(), ["conv_dw", "fc1"]),  # 7x7, each channel apart
    (unet, ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "to_q"]),
    (vae, is_one_group),
]


@pytest.mark.parametrize(
    ("build", "targets"), CASES, ids=[*("mlp", "plain", "depthwise"), "unet", "vae"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_patched_reached_trained_and_given_back(build, targets, layout):
    model, inputs = build()
    model = model.eval().requires_grad_(False).to(memory_format=layout)
    with torch.no_grad():
        base = first(model(*inputs))
    rank = {"*.conv_dw": 8, "*": 2} if targets == ["conv_dw", "fc1"] else 2
    tokengate.patch(model, targets, "dora", rank=rank, tau=1e-4)
    patched = tokengate.layers(model)
    assert any(isinstance(layer, nn.Conv2d) for layer in patched.values())
    with torch.no_grad():
        at_first = first(model(*inputs))
    assert torch.equal(at_first, base)
    assert at_first.stride() == base.stride()
    away_from_initialisation(model, 0.1)
    with tokengate.record(model) as rec:
        changed = first(model(*inputs))
    assert (changed - base).abs().max() > 1e-4 * base.abs().max()
    assert all(found.samples for found in rec.report().modules.values())
    changed.square().sum().backward()
    for name, layer in patched.items():
        for parameter in (*layer.modification.parameters(), layer.gate.tau):
            assert parameter.grad.isfinite().all(), name
        assert layer.modification.B.grad.any(), name
    tokengate.unpatch(model)
    with torch.no_grad():
        assert torch.equal(first(model(*inputs)), base)


def test_timms_same_padding_is_followed():
    from timm.layers import Conv2dSame, StdConv2d

    for kernel, stride, dilation, size in ((3, 2, 1, 9), (4, 2, 1, 8), (3, 1, 2, 7), (5, 3, 1, 10)):
        model = nn.ModuleDict({"conv": Conv2dSame(3, 4, kernel, stride, dilation=dilation)})
        x = torch.randn(2, 3, size, size + 1)
        base = model["conv"](x)
        tokengate.patch(model, ["conv"], rank=2, gate=False, scale=1.0)
        assert torch.equal(model["conv"](x), base)
        away_from_initialisation(model)
        modification = model["conv"].modification
        matrix = (modification.B @ modification.A).view(4, 3, kernel, kernel)
        wanted = Conv2dSame(3, 4, kernel, stride, dilation=dilation)
        with torch.no_grad():
            wanted.weight.copy_(model["conv"].weight + matrix)
            wanted.bias.copy_(model["conv"].bias)
        torch.testing.assert_close(model["conv"](x), wanted(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(tokengate.TokenGateError, match="StdConv2d, whose class computes"):
        tokengate.patch(nn.ModuleDict({"conv": StdConv2d(3, 4, 3)}), ["conv"])
