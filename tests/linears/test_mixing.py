"""Layers whose positions are channels: patched as asked, and said once."""

import warnings

import pytest
import torch
from torch import nn

import tokengate
from tokengate.errors import MixedPositionsWarning

timm = pytest.importorskip("timm", reason="the timm extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

SIZE = {"img_size": 64, "num_classes": 5}


def time_series():
    config = transformers.PatchTSMixerConfig(
        context_length=32, patch_length=8, patch_stride=8, num_input_channels=3, d_model=16,
        num_layers=2, mode="mix_channel",
    )  # fmt: skip
    return transformers.PatchTSMixerModel(config)


def images():
    return torch.randn(2, 3, 64, 64)


# A model, its input, how many positions of a sample are right, and all that mixes.
MODELS = {
    "mixer": (
        lambda: timm.create_model("mixer_s32_224", **SIZE),
        images,
        4,
        [f"blocks.{i}.mlp_tokens" for i in range(8)],
    ),
    "gated mixer": (
        lambda: timm.create_model("gmixer_12_224", **SIZE),
        images,
        16,
        [f"blocks.{i}.mlp_tokens" for i in range(12)],
    ),
    "resmlp": (
        lambda: timm.create_model("resmlp_12_224", **SIZE),
        images,
        16,
        [f"blocks.{i}.linear_tokens" for i in range(12)],
    ),
    "gmlp": (
        lambda: timm.create_model("gmlp_ti16_224", **SIZE),
        images,
        16,
        [f"blocks.{i}.mlp_channels.gate.proj" for i in range(30)],
    ),
    "cait": (
        lambda: timm.create_model(
            "cait_xxs24_224", **SIZE, depth=1, depth_token_only=1, embed_dim=24, num_heads=4
        ),
        images,
        16,
        ["blocks.0.attn.proj_l", "blocks.0.attn.proj_w"],
    ),
    "time series": (
        time_series,
        lambda: torch.randn(2, 32, 3),
        3 * 4,
        [
            f"encoder.mlp_mixer_encoder.mixers.{i}.{mixer}.{part}"
            for i in (0, 1)
            for mixer in ("patch_mixer", "channel_feature_mixer")
            for part in ("mlp", "gating_block")
        ],
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_all_that_mixes_is_named_and_patched(name):
    make, inputs, tokens, mixing = MODELS[name]
    model = make()
    shown = ", ".join(repr(n) for n in mixing[:3])
    if len(mixing) > 3:
        shown += f" and {len(mixing) - 3} more"
    with pytest.warns(MixedPositionsWarning) as caught:
        tokengate.patch(model, "all-linear")
    assert [w.filename for w in caught] == [__file__]
    assert str(caught[0].message).startswith(f"{shown} mix tokens or heads, so that")
    layers = tokengate.layers(model)
    with tokengate.record(model) as rec:
        model(inputs())
    # The layers named are those whose positions are not the tokens, and no others.
    others = {
        layer
        for layer, counted in rec.report().modules.items()
        if "head" not in layer and counted.positions // counted.samples not in (tokens, tokens + 1)
        and not (name == "cait" and "token_only" in layer)
    }  # fmt: skip
    inside = {layer for layer in layers if any(f"{layer}.".startswith(f"{n}.") for n in mixing)}
    assert inside
    assert others == inside
    tokengate.unpatch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokengate.patch(model, "all-linear", exclude=mixing)
    assert layers.keys() - tokengate.layers(model).keys() == inside


def test_a_subclass_mixes_as_well():
    class Own(timm.models.mlp_mixer.SpatialGatingUnit):
        pass

    with pytest.warns(MixedPositionsWarning, match=r"^'proj' mix"):
        tokengate.patch(Own(8, 4), ["proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokengate.patch(nn.ModuleDict({"proj": nn.Linear(4, 4)}), ["proj"])
