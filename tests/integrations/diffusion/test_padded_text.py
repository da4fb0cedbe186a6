"""The text of diffusion transformers, padded: projected, joined with the image, named otherwise."""

import pytest
import torch

import tokengate

diffusers = pytest.importorskip("diffusers", reason="the test extra is not installed")

LENGTH, REAL = 7, 10
MASK = (torch.arange(LENGTH) < torch.tensor([[6], [4]])).long()
SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
TIME = torch.ones(2)


def text(size=12, length=LENGTH):
    return torch.randn(2, length, size)


def latents(*shape):
    return torch.randn(2, 4, *shape)


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        **SMALL, in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8, patch_size=2, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(8, 8), "encoder_hidden_states": text(), "timestep": TIME,
        "encoder_attention_mask": MASK,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        **SMALL, in_channels=8, out_channels=8, cross_attention_dim=16, caption_channels=12
    )
    return model, {
        "hidden_states": torch.randn(2, 12, 8), "encoder_hidden_states": text(), "timestep": TIME,
        "encoder_attention_mask": MASK, "num_frames": 2, "height": 2, "width": 3,
        "rope_interpolation_scale": (1.0, 1.0, 1.0),
    }  # fmt: skip


def sana():
    model = diffusers.SanaTransformer2DModel(
        **SMALL, in_channels=4, out_channels=4, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=4,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(4, 4), "encoder_hidden_states": text(), "timestep": TIME,
        "encoder_attention_mask": MASK,
    }  # fmt: skip


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": text(),
        "timestep": TIME, "encoder_hidden_states_mask": MASK, "img_shapes": [[(1, 4, 4)]] * 2,
    }  # fmt: skip


def hunyuan_dit():
    """Two texts, of 10 and of 4 real positions, the second projected, and then both joined."""
    model = diffusers.HunyuanDiT2DModel(
        **SMALL | {"num_layers": 2}, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        mlp_ratio=2, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=16,
        text_len=LENGTH, text_len_t5=5, learn_sigma=False,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(8, 8), "timestep": TIME, "encoder_hidden_states": text(),
        "text_embedding_mask": MASK, "encoder_hidden_states_t5": text(16, 5),
        "text_embedding_mask_t5": (torch.arange(5) < torch.tensor([[3], [1]])).long(),
        "image_meta_size": torch.ones(2, 6), "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
    }  # fmt: skip


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        **SMALL, in_channels=4, out_channels=4, num_single_layers=1, num_refiner_layers=1,
        patch_size=1, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=6,
        rope_axes_dim=(2, 2, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(1, 4, 4), "timestep": TIME, "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK, "pooled_projections": torch.randn(2, 6), "guidance": TIME,
    }  # fmt: skip


def lumina():
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=16, num_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, learn_sigma=False,
        cross_attention_dim=12,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(8, 8), "timestep": TIME, "encoder_hidden_states": text(),
        "encoder_mask": MASK, "cross_attention_kwargs": {},
        "image_rotary_emb": torch.randn(16, 16, 4).to(torch.complex64),
    }  # fmt: skip


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
        axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=12,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(8, 8), "timestep": TIME, "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
    }  # fmt: skip


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
        approximator_num_channels=64, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 4), "timestep": TIME, "encoder_hidden_states": text(),
        "txt_ids": torch.zeros(LENGTH, 3), "img_ids": torch.zeros(16, 3),
        "attention_mask": torch.cat([MASK.bool(), torch.ones(2, 16, dtype=torch.bool)], 1),
    }  # fmt: skip


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return model, {
        "sample": latents(8, 8), "timestep": 1, "encoder_hidden_states": text(),
        "encoder_attention_mask": MASK,
    }  # fmt: skip


# Layers by a part of their name, and how many positions of two samples they must count.
PROJECTED = {"caption_projection": REAL, "attn2.to_k": REAL, "attn2.to_v": REAL}
IMAGE = {"attn1.to_q": 32, "attn2.to_q": 32}
EXPECTED = {
    pixart: {**PROJECTED, **IMAGE, "proj_out": 32},
    ltx: {**PROJECTED, "attn1.to_q": 24, "attn2.to_q": 24, "proj_out": 24},
    sana: {**PROJECTED, **IMAGE},
    qwen_image: {
        "txt_in": REAL, "add_k_proj": REAL, "add_q_proj": REAL, "to_add_out": REAL,
        "txt_mlp": REAL, "attn.to_q": 32, "img_mlp": 32,
    },
    hunyuan_dit: {"text_embedder": 4, "attn2.to_k": REAL + 4, "attn2.to_v": REAL + 4, **IMAGE},
    hunyuan_video: {
        "token_refiner.refiner_blocks.0.attn": REAL, "add_k_proj": REAL, "to_add_out": REAL,
        "ff_context": REAL, "0.ff.net.2": 32, "single_transformer_blocks.0.attn": 32 + REAL,
        "single_transformer_blocks.0.proj": 32 + REAL,
    },
    chroma: {
        "attn.add_k_proj": REAL, "0.attn.to_add_out": REAL, "transformer_blocks.0.attn.to_k": 32,
        "single_transformer_blocks.0.attn": 32 + REAL,
    },
    lumina: {"attn2.to_k": REAL, "attn2.to_v": REAL, **IMAGE},
    lumina2: {
        "caption_embedder": REAL, "context_refiner.0.attn": REAL, "noise_refiner.0.attn": 32,
        "layers.0.attn": 32 + REAL, "layers.0.feed_forward": 32 + REAL,
    },
    unet: {"attn2.to_k": REAL, "attn2.to_v": REAL, "attn1.to_q": 128},
}  # fmt: skip
# Of token refiners' and noise refiners' blocks the last parts are those of others, too.
NOT = {chroma: ("single",), hunyuan_video: ("refiner", "single"), lumina2: ("refiner",)}


# Chroma's own.
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", list(EXPECTED), ids=lambda make: make.__name__)
def test_padding_of_the_text_counts_in_nothing(make):
    torch.manual_seed(0)
    model, given = make()
    model = tokengate.patch(model.eval(), "all-linear", rank=2)
    for call in (model, model.forward):
        with tokengate.record(model) as rec, torch.no_grad():
            call(**given)
        found = {name: each.positions for name, each in rec.report().modules.items()}
        for part, wanted in EXPECTED[make].items():
            others = () if any(p in part for p in NOT.get(make, ())) else NOT.get(make, ())
            counted = {
                name: each for name, each in found.items()
                if part in name and not any(other in name for other in others)
            }  # fmt: skip
            assert set(counted.values()) == {wanted}, (part, counted)


@pytest.mark.parametrize("make", [pixart, ltx, sana], ids=lambda make: make.__name__)
def test_as_many_positions_of_text_as_of_the_image(make):
    """What the modules were given tells them apart, not how many there are."""
    torch.manual_seed(0)
    model, given = make()
    many = 12 if make is ltx else 16
    mask = (torch.arange(many) < torch.tensor([[6], [4]])).long()
    given |= {"encoder_hidden_states": text(length=many), "encoder_attention_mask": mask}
    tokengate.patch(model.eval(), "all-linear", rank=2)
    with tokengate.record(model) as rec, torch.no_grad():
        model(**given)
    for name, module in rec.report().modules.items():
        if "caption_projection" in name or "attn2.to_k" in name or "attn2.to_v" in name:
            assert module.positions == REAL, name
        elif "attn" in name or name == "proj_out":
            assert module.positions == 2 * many, name
