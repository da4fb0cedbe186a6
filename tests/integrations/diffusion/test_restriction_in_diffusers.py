"""restrict in diffusion transformers: tokens of text and image, apart and joined."""

import pytest
import torch
from models import away_from_initialisation
from torch.nn import functional as F

import tokengate
from tokengate.errors import UnreachedLayerWarning

diffusers = pytest.importorskip("diffusers", reason="the test extra is not installed")

TEXT, WIDE = 5, 4
# Of the joint blocks, which have text and image side by side, and the single ones, which join them.
IMAGE = "transformer_blocks.0.attn.to_q"
WORDS = "transformer_blocks.0.attn.add_q_proj"
JOINED = "single_transformer_blocks.0.attn.to_q"


def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    return tokengate.patch(model, [IMAGE, WORDS, JOINED], rank=2)


def picture(height, width):
    return {
        "hidden_states": torch.randn(2, height * width, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.ones(2),
        "img_ids": torch.zeros(height * width, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def test_a_region_of_the_picture_at_each_resolution():
    model = away_from_initialisation(flux())
    region = torch.zeros(2, 2)
    region[:, 1] = 1  # the right half

    def where(name, shape):
        if name == WORDS:
            return False
        image = shape[1] - (TEXT if name == JOINED else 0)
        side = WIDE if image % WIDE == 0 else 6
        scaled = F.interpolate(region[None, None], (image // side, side))[0, 0].flatten() > 0
        text = torch.zeros(shape[1] - image, dtype=torch.bool)
        return torch.cat([text, scaled]).expand(shape)

    for height, width in ((2, WIDE), (3, 6)):
        given = picture(height, width)
        with tokengate.restrict(model, where), tokengate.record(model, positions=True) as rec:
            inside = model(**given).sample
        right = (torch.arange(height * width) % width >= width // 2).expand(2, -1)
        found = {name: torch.cat(parts) for name, parts in rec.positions.items()}
        assert torch.equal(found[IMAGE], right)
        assert not found[WORDS].any()
        assert torch.equal(found[JOINED][:, TEXT:], right)
        assert not found[JOINED][:, :TEXT].any()
        with tokengate.disabled(model):
            base = model(**given).sample
        assert (inside - model(**given).sample).abs().max() > 1e-4
        assert (inside - base).abs().max() > 1e-4


def test_masks_for_each_kind_of_layer():
    model, given = away_from_initialisation(flux()), picture(2, WIDE)
    image, text = torch.rand(2, 8) < 0.5, torch.rand(2, TEXT) < 0.5
    masks = {IMAGE: image, WORDS: text, JOINED: torch.cat([text, image], 1)}
    with tokengate.restrict(model, masks), tokengate.record(model, positions=True) as rec:
        model(**given)
    for name, mask in masks.items():
        assert torch.equal(torch.cat(rec.positions[name]), mask)
    # One mask for all fits some of them alone.
    with (
        tokengate.restrict(model, image),
        pytest.raises(tokengate.TokenGateError, match=r"\(2, 8\).*\(2, 5\)"),
    ):
        model(**given)


def test_projections_that_are_fused_afterwards_are_named():
    model = flux()
    model.fuse_qkv_projections()
    with pytest.warns(UnreachedLayerWarning, match="transformer_blocks.0.attn.to_q.*never called"):
        model(**picture(2, 3))
