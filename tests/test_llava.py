"""LLaVA: its vision tower, its language model, and both."""

import pytest
import torch
from models import away_from_initialisation

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

IMAGE = 63
TARGETS = {
    "vision": ["*vision_tower*.layers.0.*.q_proj", "*vision_tower*.layers.0.*.v_proj"],
    "language": ["*language_model*.q_proj", "*language_model*.v_proj"],
}
TARGETS["both"] = TARGETS["vision"] + TARGETS["language"]


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8, projection_dim=32,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def inputs():
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 1:5] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images}


@pytest.mark.parametrize("side", list(TARGETS))
def test_one_side_or_both(side):
    model = llava()
    base = model(**inputs()).logits
    tokengate.patch(model, TARGETS[side], tau=0.05)
    names = list(tokengate.layers(model))
    assert len(names) == {"vision": 2, "language": 4, "both": 6}[side]
    assert torch.equal(model(**inputs()).logits, base)
    tokengate.verify(model, **inputs())
    away_from_initialisation(model, 0.2)
    with tokengate.record(model) as rec:
        changed = model(**inputs()).logits
    assert not torch.allclose(changed, base, atol=1e-3)
    for name, module in rec.report().modules.items():
        # The images' five positions each, the texts' real ones.
        assert module.positions == (10 if "vision_tower" in name else 15), name
    tokengate.unpatch(model)
    assert torch.equal(model(**inputs()).logits, base)


def test_generate_with_images_is_the_same_with_and_without_cache():
    model = llava()
    tokengate.patch(model, TARGETS["both"], tau=0.05)
    away_from_initialisation(model, 0.2)
    given = {key: value[:1] for key, value in inputs().items()}
    outputs = [
        model.generate(
            **given, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0
        ).tolist()
        for cached in (True, False)
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0][0]) > 9


def test_the_last_vision_layer_is_not_used_and_verify_says_so():
    model = tokengate.patch(llava(), ["*vision_tower*.q_proj"])
    with pytest.raises(tokengate.TokenGateError, match=r"layers\.1\..* got no gradient"):
        tokengate.verify(model, **inputs())
