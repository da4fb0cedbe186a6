"""The architectures of timm, torch, torchvision and open_clip."""

from __future__ import annotations

import open_clip
import timm
import torch
import torchvision
from architectures import Architecture, Refusal, images, tokens
from torch import nn

from tokengate.integrations.vision import roles

ALL = ("q", "k", "v", "proj", "fc1", "fc2")
# What is left where q, k and v are in a layer that is never called.
LIVE = ("proj", "fc1", "fc2")
MLP = ("fc1", "fc2")

VISION: list[Architecture] = []


def awake(model):
    """`model` without the zeros that switch its heads and branches off before training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 0 or not parameter.any() or parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1)
    return model


def vision(name, what=ALL, size=32, **options):
    """A model of timm, with blocks and widths cut down by `options`."""
    VISION.append(
        Architecture(
            f"timm/{name}",
            lambda: awake(timm.create_model(name, num_classes=5, **options)),
            lambda model: model(images(size)),
            what,
            roles,
        )
    )


def vit(name, what=ALL, size=64, **options):
    vision(name, what, size, img_size=size, depth=2, **{"embed_dim": 64, "num_heads": 4, **options})


vit("vit_base_patch16_224")
vit("deit_tiny_patch16_224")
vit("deit_tiny_distilled_patch16_224")
vit("deit3_small_patch16_224")
vit("vit_small_patch14_reg4_dinov2", size=56)
vit("vit_base_patch16_siglip_224")
vit("vit_small_patch16_18x2_224")
vit("vit_relpos_small_patch16_224")
vit("vit_dlittle_patch16_reg1_gap_256")
vit("vit_pe_core_tiny_patch16_384")
vit("vit_base_patch16_xp_224")
vit("vit_medium_patch16_rope_reg1_gap_256", LIVE)
vit("eva02_tiny_patch14_224", LIVE, size=56)
vit("eva02_base_patch16_clip_224")
vit("vit_small_patch16_dinov3")
vit("vit_small_plus_patch16_dinov3")
vit("vit_small_patch16_dinov3_qkvb", LIVE)
vit("beit_base_patch16_224", LIVE)
vit("beitv2_base_patch16_224", LIVE)
vit("beit3_base_patch16_224")
vit("aimv2_large_patch14_224", size=56)
vit("samvit_base_patch16_224", global_attn_indexes=(1,), window_size=3)
vision("naflexvit_base_patch16_gap", size=64, depth=2, embed_dim=64, num_heads=4)
SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
vision("swin_tiny_patch4_window7_224", size=56, img_size=56, window_size=4, **SWIN)
vision("swinv2_tiny_window8_256", LIVE, size=64, img_size=64, **SWIN)
vision("swinv2_cr_tiny_224", size=64, img_size=64, window_size=8, **SWIN)
vision("hiera_tiny_224", size=64, img_size=64, embed_dim=24, num_heads=1, stages=(1, 1, 1, 1))
vision("hieradet_small", size=64)
vit("cait_xxs24_224", depth_token_only=1)
vit("xcit_nano_12_p16_224", cls_attn_layers=1)
vit("convit_tiny", local_up_to_layer=1)
vision("davit_tiny", size=64, depths=(1, 1, 1, 1), embed_dims=(24, 24, 24, 24))
vision("tiny_vit_5m_224", size=64, depths=(1, 1, 1, 1), window_sizes=(2, 2, 2, 2))
vision("pvt_v2_b0", size=64)
vision("twins_svt_small", size=64, img_size=64, depths=(1, 1, 1, 1))
vision("mvitv2_tiny", size=64, img_size=64)
vision("nest_tiny", size=64, img_size=64)
vision("coat_lite_tiny", size=64, img_size=64)
vision("crossvit_9_240", size=240)
vision("levit_128s", size=64, img_size=64)
vision("mobilevit_xxs", size=64)
vision("edgenext_xx_small", size=64)
vision("caformer_s18", size=64)
vision("nextvit_small", ("q", "k", "v", "proj"), size=64)
vision("convnext_tiny", MLP, size=64, depths=(1, 1, 1, 1), dims=(24, 24, 24, 24))
vision("gmlp_ti16_224", MLP, size=64, img_size=64)
vision("resmlp_12_224", MLP, size=64, img_size=64)
vision("mixer_s32_224", MLP, size=64, img_size=64)


def named(name, build, run, *targets):
    VISION.append(Architecture(name, build, run, targets))


def sequence(length=7, width=32):
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(5))


class LSTMTagger(nn.Module):
    """A model without attention."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(32, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


named(
    "torch/transformer_decoder",
    lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2),
    lambda model: model(sequence(), sequence(5)),
    "linear1",
    "linear2",
)
named(
    "torch/lstm_tagger",
    LSTMTagger,
    lambda model: model(sequence()),
    "head",
)
named(
    "torchvision/vit",
    lambda: awake(torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64)),
    lambda model: model(images()),
    "mlp.0",
    "mlp.3",
)
named(
    "torchvision/swin",
    lambda: awake(torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4])),
    lambda model: model(images()),
    "mlp.0",
    "mlp.3",
    "reduction",
)


def named_clip(name, vision_options, text_options, *targets):
    """A CLIP of open_clip, which reads its configs from files."""
    settings = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "head_width": 16,
            "patch_size": 8,
            **vision_options,
        },
        "text_cfg": {
            "context_length": 9,
            "vocab_size": 99,
            "width": 32,
            "heads": 4,
            "layers": 2,
            **text_options,
        },
    }

    def build():
        vision_settings = open_clip.CLIPVisionCfg(**settings["vision_cfg"])
        text_settings = open_clip.CLIPTextCfg(**settings["text_cfg"])
        return awake(open_clip.CLIP(settings["embed_dim"], vision_settings, text_settings))

    def run(model):
        image, text, _ = model(images(), tokens())
        return image @ text.T

    named(f"open_clip/{name}", build, run, *targets)


named_clip("clip", {}, {}, "c_fc", "c_proj")
BLOCKS = {"block_type": "custom", "qk_norm": True}
named_clip("clip-custom-blocks", BLOCKS, BLOCKS, "out_proj", "c_fc", "c_proj")


REFUSED: list[Refusal] = []


def refused(name, what, says, **options):
    REFUSED.append(
        Refusal(f"timm/{name}", lambda: timm.create_model(name, **options), what, says, roles)
    )


UNKNOWN = "fused in one weight in a way that is not known here, and"
refused("xcit_nano_12_p16_224", ("q", "v"), f"xca.qkv|attn.qkv' .* {UNKNOWN} k was", depth=2)
refused("levit_128s", ("q",), f"qkv.linear' .* {UNKNOWN} k and v were not asked for: ask for all")
READS = r"attn.qkv' of this \w+ is never called, because its owner reads the weight itself"
for dead in (
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_small_patch16_dinov3_qkvb",
):
    refused(dead, ALL, READS, depth=2)
refused("swinv2_tiny_window8_256", ALL, READS, depths=(1, 1, 1, 1))
refused("convnext_tiny", ("q",), "no layer of this ConvNeXt is known to hold the role 'q', it has")
refused("resnet18", ("fc1",), "it has no layer with a known role: ask for those")


def refused_by_name(name, build, target, says):
    REFUSED.append(Refusal(name, build, (target,), says))


OWNER = "whose owner .* which reads the weight itself"
refused_by_name("torch/attention", lambda: nn.MultiheadAttention(32, 4), "out_proj", OWNER)
refused_by_name("torch/encoder", lambda: nn.TransformerEncoderLayer(32, 4, 64), "out_proj", OWNER)
refused_by_name(
    "torchvision/vit",
    lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64),
    "out_proj",
    OWNER,
)
