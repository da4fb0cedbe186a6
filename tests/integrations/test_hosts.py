"""The one call, as it stands, on real model classes; and the README's."""

import pytest
import torch

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
timm = pytest.importorskip("timm", reason="the timm extra is not installed")


@pytest.fixture
def llama():
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config)


def check_one_call(model, targets, run, wanted):
    """Patched by name, reached, an exact no-op at first, trainable, and given back."""
    model.eval()
    base = run(model)
    keys = list(model.state_dict())
    tokengate.patch(model, targets=targets, method="lora")
    assert sorted(tokengate.layers(model)) == sorted(wanted)
    assert torch.equal(run(model), base)
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.modification.B.normal_(std=0.1)
    with tokengate.record(model) as rec:
        changed = run(model)
    assert not torch.equal(changed, base)
    assert all(module.samples for module in rec.report().modules.values())
    changed.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    tokengate.unpatch(model)
    assert torch.equal(run(model), base)
    assert list(model.state_dict()) == keys


def test_llama(llama):
    ids = torch.randint(0, 64, (2, 9))
    wanted = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]
    check_one_call(llama, ["q_proj", "v_proj"], lambda m: m(ids).logits, wanted)


def test_llama_all_linear_leaves_its_head(llama):
    tokengate.patch(llama, "all-linear")
    assert len(tokengate.layers(llama)) == 14
    assert type(llama.lm_head) is torch.nn.Linear


def test_generate_is_the_same_with_and_without_cache(llama):
    tokengate.patch(llama, ["q_proj", "v_proj"], tau=0.1)
    with torch.no_grad():
        for layer in tokengate.layers(llama).values():
            layer.modification.B.normal_(std=0.3)
    ids = torch.randint(3, 64, (2, 5))
    mask = torch.ones_like(ids)
    outputs = [
        llama.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=c, pad_token_id=0
        )
        for c in (True, False)
    ]
    assert torch.equal(*outputs)


def test_timm_vit():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    wanted = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    check_one_call(model, ["qkv"], lambda m: m(images), wanted)
