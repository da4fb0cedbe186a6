"""split_attention in models of torch, torchvision and open_clip: patched, the same, and back."""

import copy

import pytest
import torch
from models import away_from_initialisation, snapshot
from torch import nn

import tokengate
from tokengate.integrations.attention import merge_attention, split_attention

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]
B, L, S, E, H = 3, 4, 5, 8, 2


def check_split_and_patched(model, run, wanted):
    """Equal, patched by name, reached, a no-op at first, trainable, and given back exactly."""
    model.eval()
    before, keys = snapshot(model), list(model.state_dict())
    with torch.no_grad():
        base = run(model)
        assert split_attention(model) is model
        split = run(model)
        torch.testing.assert_close(split, base, rtol=1e-5, atol=1e-5)
        assert list(model.state_dict()) == keys
        tokengate.patch(model, PROJECTIONS, method="lora", rank=2)
        assert sorted(tokengate.layers(model)) == sorted(wanted)
        # Frozen weights alone may round differently: on some inputs torch then folds otherwise.
        with tokengate.disabled(model):
            frozen = run(model)
        torch.testing.assert_close(frozen, split, rtol=1e-5, atol=1e-5)
        assert torch.equal(run(model), frozen)
        away_from_initialisation(model)
        with tokengate.record(model) as rec:
            changed = run(model)
    assert not torch.allclose(changed, base, rtol=1e-3)
    assert all(module.samples for module in rec.report().modules.values())
    run(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    patched = snapshot(model)
    with pytest.raises(tokengate.TokenGateError, match="is patched, which would then never be"):
        merge_attention(model)
    assert snapshot(model) == patched
    assert merge_attention(tokengate.unpatch(model)) is model
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(run(model), base)


def names(*owners):
    return [f"{owner}.{name}" for owner in owners for name in PROJECTIONS]


def test_torch_encoder_layer_calls_its_projections_in_evaluation():
    layer, x = nn.TransformerEncoderLayer(E, H, 16, batch_first=True), torch.randn(B, L, E)
    check_split_and_patched(layer, lambda m: m(x), names("self_attn"))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_transformer(batch_first):
    model = nn.Transformer(E, H, 2, 1, 16, batch_first=batch_first)
    source, target = torch.randn(B, S, E), torch.randn(B, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)

    def run(m):
        both = (x if batch_first else x.transpose(0, 1) for x in (source, target))
        return m(*both, tgt_mask=causal, tgt_is_causal=True)

    owners = ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")
    owners += ("decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn")
    check_split_and_patched(model, run, names(*owners))


# torch's own words, when an nn.TransformerEncoder takes its fast path.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_encoder_with_padding_makes_no_nested_tensors():
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    whole = nn.ModuleDict({"encoder": encoder})
    before, x = snapshot(whole), torch.randn(B, L, E)
    padded = torch.arange(L) >= torch.tensor([[2], [3], [4]])
    fast = encoder(x, src_key_padding_mask=padded)
    assert fast[padded].count_nonzero() == 0
    # Split from below, the encoder is not seen: an error, never a patch that is not asked.
    split_attention(encoder.layers)
    with pytest.raises(tokengate.TokenGateError, match="was given a nested tensor"):
        encoder(x, src_key_padding_mask=padded)
    merge_attention(encoder.layers)
    assert snapshot(whole) == before

    split_attention(whole)
    assert whole.encoder.use_nested_tensor is False
    out = encoder(x, src_key_padding_mask=padded)
    torch.testing.assert_close(out[~padded], fast[~padded], rtol=1e-5, atol=1e-5)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        merged = merge_attention(copy.deepcopy(whole))
        torch.testing.assert_close(merged.encoder(x, src_key_padding_mask=padded), out)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    tokengate.patch(whole, "all-linear", rank=2)
    assert sorted(tokengate.layers(whole)) == sorted(
        names("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")
        + [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    )
    with torch.no_grad(), tokengate.record(whole) as rec:
        encoder(x, src_key_padding_mask=padded)
    assert {module.positions for module in rec.report().modules.values()} == {2 + 3 + 4}
    tokengate.unpatch(whole)
    tokengate.patch(whole, ["linear1"])
    with pytest.raises(tokengate.TokenGateError, match=r"'encoder.layers.0.linear1' is patched"):
        merge_attention(whole)
    # Its parts may be merged first; the encoder is then given back by the whole.
    merge_attention(tokengate.unpatch(whole).encoder.layers)
    merge_attention(whole)
    assert snapshot(whole) == before


def test_torchvision():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    nn.init.normal_(model.heads.head.weight)  # zero at first: no gradient would reach a layer
    images = torch.randn(2, 3, 32, 32)
    layers = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in (0, 1)]
    check_split_and_patched(model, lambda m: m(images), names(*layers))


TEXT = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 4, "layers": 1}


VISION = {"image_size": 32, "layers": 1, "width": 64, "head_width": 16, "patch_size": 8}


POOL = {"attentional_pool": True, "attn_pooler_heads": 4}


def test_open_clip():
    open_clip = pytest.importorskip("open_clip", reason="the open_clip extra is not installed")
    model = open_clip.CLIP(32, VISION | POOL, TEXT)
    images, text = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 12))

    def run(m):
        image, words, _ = m(images, text)
        return image @ words.T

    owners = ("visual.transformer.resblocks.0.attn", "visual.attn_pool.attn")
    check_split_and_patched(model, run, names(*owners, "transformer.resblocks.0.attn"))
    # What it reads and casts of an attention is there while it is split.
    open_clip.model.convert_weights_to_lp(split_attention(model), torch.bfloat16)
    assert model.transformer.resblocks[0].attn.q_proj.weight.dtype == torch.bfloat16
    assert model.transformer.get_cast_dtype() == torch.bfloat16


def test_open_clip_coca():
    open_clip = pytest.importorskip("open_clip", reason="the open_clip extra is not installed")
    model = open_clip.CoCa(
        32,
        multimodal_cfg=TEXT,
        vision_cfg=VISION | POOL | {"output_tokens": True},
        text_cfg=TEXT | {"embed_cls": True, "output_tokens": True},
    )
    # open_clip leaves it as the memory was.
    nn.init.normal_(model.text_decoder.text_projection, std=32**-0.5)
    images, text = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 11))

    def run(m):
        out = m(images, text)
        similarity = out["image_features"] @ out["text_features"].T
        return torch.cat((similarity.flatten(), out["logits"].flatten()))

    owners = ("visual.transformer.resblocks.0.attn", "visual.attn_pool.attn")
    owners += ("text.transformer.resblocks.0.attn", "text_decoder.resblocks.0.attn")
    owners += ("text_decoder.cross_attn.0.attn",)
    check_split_and_patched(model, run, names(*owners))
