"""open_clip: either tower or both, split, patched and given back."""

import warnings

import pytest
import torch
from models import away_from_initialisation, snapshot
from torch import nn

import tokengate
from tokengate.errors import UnreachedLayerWarning
from tokengate.integrations.attention import SplitAttention

open_clip = pytest.importorskip("open_clip", reason="the open_clip extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from tokengate.integrations.clip import clip_targets, merge_towers, split_towers  # noqa: E402

ROLES = ("q", "k", "v", "o", "fc1", "fc2")
TEXT = {"context_length": 9, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}
VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
CUSTOM = {"block_type": "custom", "qk_norm": True}
POOL = {"attentional_pool": True, "attn_pooler_heads": 4}
RESNET = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 16, "head_width": 16}
TIMM = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": ""}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
WORDS = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(3))
# Two towers of two blocks each, with everything that a user could name.
LAYERS = {
    "image": [
        f"visual.transformer.resblocks.{i}.{layer}"
        for i in (0, 1)
        for layer in (*(f"attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.c_fc", "mlp.c_proj")
    ],
}
LAYERS["text"] = [name.removeprefix("visual.") for name in LAYERS["image"]]


def clip(kind=open_clip.CLIP, vision=None, text=None):
    return kind(24, VISION | (vision or {}), TEXT | (text or {})).eval()


def full_names(targets):
    return [target.pattern.replace("\\", "") for target in targets]


def run(model):
    image, text, _ = model(IMAGES, WORDS)
    return torch.cat((image, text))


@pytest.mark.parametrize("towers", [("image",), ("text",), ("image", "text")])
def test_either_tower_or_both(towers):
    model = clip()
    before, keys = snapshot(model), list(model.state_dict())
    with torch.no_grad():
        base = run(model)
    assert split_towers(model, *towers) is model
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        split = run(model)
    torch.testing.assert_close(split, base, rtol=1e-5, atol=1e-5)
    # Only what was asked for is converted.
    others = {"image", "text"} - set(towers)
    attentions = [n for n, m in model.named_modules() if isinstance(m, SplitAttention)]
    assert len(attentions) == 2 * len(towers)
    for tower in others:
        with pytest.raises(tokengate.TokenGateError, match=f'call split_towers.model, "{tower}"'):
            clip_targets(model, tower, "q")

    targets = [target for tower in towers for target in clip_targets(model, tower, *ROLES)]
    wanted = [name for tower in towers for name in LAYERS[tower]]
    assert full_names(targets) == wanted
    # As names, those of the text tower would mean the image tower's, too.
    tokengate.patch(model, targets, rank=2, tau=0.05)
    assert set(tokengate.layers(model)) == set(wanted)
    with tokengate.disabled(model):
        frozen = run(model)
    assert torch.equal(run(model), frozen)
    tokengate.verify(model, IMAGES, WORDS)
    away_from_initialisation(model, 0.2)
    changed = run(model)
    for tower, rows in (("image", slice(0, 2)), ("text", slice(2, 4))):
        assert torch.equal(changed[rows], frozen[rows]) == (tower not in towers)
    with tokengate.disabled(model):
        assert torch.equal(run(model), frozen)

    merge_towers(tokengate.unpatch(model))
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(run(model), base)


def test_a_tower_alone_is_counted_and_trained():
    """encode_image and encode_text do not call the model's own forward."""
    model = split_towers(clip())
    targets = [clip_targets(model, tower, "q", "fc1") for tower in ("image", "text")]
    tokengate.patch(model, targets[0] + targets[1], tau=0.05)
    away_from_initialisation(model, 0.2)
    runs = (("image", IMAGES, 17), ("text", WORDS, 9))
    for (tower, given, length), asked in zip(runs, targets, strict=True):
        own = set(full_names(asked))
        with tokengate.record(model) as rec:
            getattr(model, f"encode_{tower}")(given).square().sum().backward()
        modules = rec.report().modules
        assert {n for n, m in modules.items() if m.samples} == own
        # open_clip's text tower has no padding mask: all of its context length counts.
        assert {modules[name].positions for name in own} == {2 * length}
        trained = [n for n, p in model.named_parameters() if p.grad is not None]
        assert {n.partition(".modification")[0].partition(".gate")[0] for n in trained} == own
        model.zero_grad(set_to_none=True)


def test_the_first_whole_forward_is_what_is_checked():
    model = split_towers(clip())
    targets = clip_targets(model, "image", "q") + clip_targets(model, "text", "q")
    tokengate.patch(model, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_image(IMAGES)
    # Only images so far, and this is the model's own forward.
    with pytest.warns(UnreachedLayerWarning, match=r"'transformer.resblocks.0.attn.q_pr"):
        model(IMAGES)
    other = split_towers(clip())
    tokengate.patch(other, targets)
    other(IMAGES, WORDS)


def test_custom_text_clip_and_coca():
    names = LAYERS["image"] + [f"text.{name}" for name in LAYERS["text"]]
    coca = open_clip.CoCa(
        24,
        multimodal_cfg=TEXT,
        vision_cfg=VISION | POOL | {"output_tokens": True},
        text_cfg=TEXT | {"embed_cls": True, "output_tokens": True},
    )
    for model in (clip(open_clip.CustomTextCLIP), coca):
        before = snapshot(model)
        split_towers(model)
        found = clip_targets(model, "image", *ROLES) + clip_targets(model, "text", *ROLES)
        assert full_names(found) == names
        merge_towers(model)
        # As text, what is NaN equals itself.
        assert str(snapshot(model)) == str(before)


def test_an_attentional_pool_is_left_alone():
    model = clip(vision=POOL)
    pool = model.visual.attn_pool.attn
    split_towers(model, "image")
    assert type(pool) is nn.MultiheadAttention
    tokengate.patch(model, clip_targets(model, "image", "q", "o"))
    assert not any("attn_pool" in name for name in tokengate.layers(model))
    tokengate.verify(model, IMAGES)


def test_custom_blocks_hold_only_o_and_the_mlp():
    model = clip(vision=CUSTOM, text=CUSTOM)
    before = snapshot(model)
    split_towers(model)
    assert snapshot(model) == before
    with pytest.raises(tokengate.TokenGateError, match=r"'q' of the text tower .* leave it out"):
        clip_targets(model, "text", "q")
    rest = [role for tower in LAYERS for role in clip_targets(model, tower, "o", "fc1", "fc2")]
    tokengate.patch(model, rest)
    assert len(rest) == 12
    tokengate.verify(model, IMAGES, WORDS)
    merge_towers(tokengate.unpatch(model))
    assert snapshot(model) == before


def test_a_tower_of_timm():
    pytest.importorskip("timm", reason="the timm extra is not installed")
    model = clip(vision=TIMM)
    split_towers(model)
    assert not any(isinstance(m, SplitAttention) for m in model.visual.modules())
    found = clip_targets(model, "image", *ROLES)
    assert full_names(found)[:4] == [
        f"visual.trunk.blocks.0.{layer}"
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    tokengate.patch(model, found + clip_targets(model, "text", "q"), rank=1)
    tokengate.verify(model, torch.randn(1, 3, 224, 224), WORDS[:1])


def hugging_face(config):
    """A CLIP whose text tower is `config`'s, made without a download."""
    model = clip(open_clip.CustomTextCLIP)
    model.text = open_clip.hf_model.HFTextEncoder(
        "", 24, config, pooler_type="mean_pooler", proj_type="linear"
    ).eval()
    return model


def test_a_tower_of_transformers_and_its_padding():
    model = hugging_face(
        transformers.RobertaConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, pad_token_id=1, max_position_embeddings=32,
        )
    )  # fmt: skip
    split_towers(model, "text")
    assert not any(isinstance(m, SplitAttention) for m in model.modules())
    found = clip_targets(model, "text", "q", "fc2")
    assert full_names(found) == [
        f"text.transformer.encoder.layer.{i}.{layer}"
        for i in (0, 1)
        for layer in ("attention.self.query", "output.dense")
    ]
    tokengate.patch(model, found, tau=0.05)
    words = WORDS.clamp(min=2)
    words[1, 6:] = 1
    for encode in (model.encode_text, lambda words: model(IMAGES, words)):
        with tokengate.record(model) as rec:
            encode(words)
        assert {m.positions for m in rec.report().modules.values()} == {15}


def test_both_halves_of_a_gated_mlp_are_fc1():
    text = {
        "vocab_size": 99, "d_model": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 48,
    }  # fmt: skip
    model = hugging_face(transformers.MT5Config(**text))
    model.text.transformer = transformers.MT5EncoderModel(transformers.MT5Config(**text))
    halves = full_names(clip_targets(model, "text", "fc1"))
    assert [name.rpartition(".")[2] for name in halves] == ["wi_0", "wi_1"]


def test_refusals():
    resnet = clip(vision=RESNET)
    split_towers(resnet)
    cases = [
        (lambda: clip_targets(resnet, "image", "q"), "a ModifiedResNet without transformer blocks"),
        (lambda: clip_targets(resnet, "vision", "q"), "the tower 'vision': the towers are image"),
        (lambda: split_towers(resnet, "vision"), "the tower 'vision': the towers are image"),
        (lambda: clip_targets(resnet, "text", "c_fc"), "unknown role 'c_fc': the roles are q, k"),
        (lambda: clip_targets(resnet, "text"), "no role was asked for"),
        (lambda: clip_targets(nn.Linear(2, 2), "text", "q"), "a Linear, which is no model of open"),
        (lambda: split_towers(resnet, "text"), "which is split already"),
        (lambda: clip_targets(clip(), "image", "o"), r'call split_towers\(model, "image"\) first'),
    ]
    for call, says in cases:
        with pytest.raises(tokengate.TokenGateError, match=says) as error:
            call()
        assert str(error.value).endswith(".")
        assert "\n" not in str(error.value)
    # What needs no splitting is there without it.
    assert len(clip_targets(clip(), "image", "fc1")) == 2
    unsplit = clip()
    before = snapshot(unsplit)
    assert merge_towers(unsplit) is unsplit
    assert snapshot(unsplit) == before
