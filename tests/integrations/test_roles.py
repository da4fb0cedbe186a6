"""Roles: from endings to layers; the names of some families longhand; the paper's target sets."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
timm = pytest.importorskip("timm", reason="the timm extra is not installed")

from architectures_text import BLOOM, TEXT, from_config  # noqa: E402

from tokengate.integrations import language, vision  # noqa: E402
from tokengate.integrations.roles import holders  # noqa: E402

NAMES = {one.name: one for one in TEXT}


def ask(name, *roles):
    """The layers of the model's first block that hold `roles`, without their common prefix."""
    model = NAMES[f"transformers/{name}"].build()
    first = re.compile(r".*?\b0\.")
    names = (n for n in language.roles(model, *roles) if re.match(r"\D*0\.", n))
    return [first.sub("", n, count=1) for n in names]


def test_names_longhand():
    assert ask("llama", "q", "up") == ["self_attn.q_proj", "mlp.up_proj"]
    assert ask("phi3", "q", "k", "v", "o") == ["self_attn.o_proj", "self_attn.qkv_proj"]
    assert ask("phi3", "gate", "up") == ["mlp.gate_up_proj"]
    assert ask("gpt_neox", "o", "up") == ["attention.dense", "mlp.dense_h_to_4h"]
    assert ask("bert", "q", "o") == ["attention.self.query", "attention.output.dense"]
    assert ask("bert", "up", "down") == ["intermediate.dense", "output.dense"]
    assert ask("t5", "up") == [f"{layer}.DenseReluDense.wi" for layer in ("layer.1", "layer.2")]
    assert ask("t5-v1_1", "gate", "down")[:2] == [
        "layer.1.DenseReluDense.wi_0",
        "layer.1.DenseReluDense.wo",
    ]
    assert ask("deepseek_v3", "q") == ["self_attn.q_a_proj", "self_attn.q_b_proj"]
    assert ask("modernbert", "up", "gate", "down") == ["mlp.Wi", "mlp.Wo"]


def test_parts_of_fused_layers():
    """The slices that are asked for; the whole layer for all of them, unless apart."""
    assert ask("phi3", "q", "v", "up") == [
        "self_attn.qkv_proj.q",
        "self_attn.qkv_proj.v",
        "mlp.gate_up_proj.up",
    ]
    assert ask("gpt_neox", "k") == ["attention.query_key_value.k"]
    assert ask("gpt2", "q", "o") == ["attn.c_attn.q", "attn.c_proj"]
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert vision.roles(model, "q", "v") == ["blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v"]
    assert vision.roles(model, "v", "k", "q") == ["blocks.0.attn.qkv"]
    apart = vision.roles(model, "v", "k", "q", apart=True)
    assert apart == [f"blocks.0.attn.qkv.{role}" for role in "qkv"]
    tokengate.patch(model, apart)
    assert list(tokengate.layers(model)) == apart
    # What is fused in an unknown way is whole or not at all.
    levit = timm.create_model("levit_128s")
    with pytest.raises(tokengate.TokenGateError, match="they were asked for apart: ask for all"):
        vision.roles(levit, "q", "k", "v", apart=True)


def test_the_paper_s_target_sets():
    targets = language.PAPER_TARGETS
    assert ask("llama", *targets["commonsense"]) == [
        *(f"self_attn.{n}_proj" for n in "qkv"),
        *(f"mlp.{n}_proj" for n in ("up", "down")),
    ]
    assert len(ask("llama", *targets["visual_instruction"])) == 7
    assert ask("deberta-v3", *targets["glue"]) == [
        *(f"attention.self.{n}_proj" for n in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
    ]


def test_only_the_text_side_and_the_vision_tower_when_it_is_passed():
    model = NAMES["transformers/llava"].build()
    assert all("language_model" in name for name in language.roles(model, "q", "down"))
    tower = model.model.vision_tower
    assert language.roles(tower, "q") == [f"encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_experts_in_linear_layers_can_be_left_out():
    model = NAMES["transformers/switch_transformers"].build()
    everything = language.roles(model, "up")
    dense = language.roles(model, "up", experts=False)
    assert dense == [name for name in everything if ".experts." not in name]
    assert (len(dense), len(everything)) == (2, 6)


def test_a_patched_model_has_the_same_roles():
    model = NAMES["transformers/llama"].build()
    before = language.roles(model, "q", "v")
    tokengate.patch(model, before)
    assert language.roles(model, "q", "v") == before


def test_a_name_is_what_the_model_of_that_name_has():
    name = "vit_tiny_patch16_224"
    assert vision.roles(name, "proj", "fc2") == vision.roles(timm.create_model(name), "fc2", "proj")
    assert len(vision.roles(name, "q", "k", "v")) == 12


def test_owners_that_could_read_the_weight_and_do_not():
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=32, num_heads=2)
    beit.blocks[0].attn.qkv_bias_separate = True
    tokengate.patch(beit, vision.roles(beit, "q", "k", "v"))
    with tokengate.record(beit) as rec:
        beit(torch.randn(1, 3, 224, 224))
    assert rec.report().modules["blocks.0.attn.qkv"].samples == 1
    bloom = from_config("bloom", sizes=BLOOM, pretraining_tp=2, slow_but_exact=False)()
    assert len(language.roles(bloom, "o", "down")) == 4


def test_what_only_looks_like_a_role():
    """Position biases, pooling heads and patch embeddings."""
    for name in ("vit_relpos_small_patch16_224", "vit_base_patch16_siglip_224"):
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        look_alikes = [n for n, _ in model.named_modules() if n.endswith(("fc1", "proj"))]
        found = vision.roles(model, "fc1", "proj")
        assert found == ["blocks.0.attn.proj", "blocks.0.mlp.fc1"]
        assert len(look_alikes) > len(found)


REFUSALS = [
    ((), "no role was asked for: pass at least one of q, k, v"),
    (("q", "query"), "unknown role 'query': the roles are q, k, v"),
]


@pytest.mark.parametrize(("asked", "says"), REFUSALS)
def test_refused_before_the_model_is_looked_at(asked, says):
    for roles in (language.roles, vision.roles):
        with pytest.raises(tokengate.TokenGateError, match=says):
            roles(nn.Linear(2, 2), *asked)


def test_an_unknown_timm_name_is_refused():
    with pytest.raises(tokengate.TokenGateError, match="timm has no model 'vit_enormous': use a"):
        vision.roles("vit_enormous", "q")


PART = st.sampled_from(["a", "b", "c"])
ENDING = st.lists(PART, min_size=1, max_size=3).map(".".join)


@given(path=st.lists(PART, min_size=1, max_size=5), endings=st.dictionaries(ENDING, PART))
def test_the_longest_ending_decides(path, endings):
    model = module = nn.Module()
    for part in path[:-1]:
        module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.add_module(path[-1], nn.Linear(2, 2))
    name = ".".join(path)
    fitting = [ending for ending in endings if f".{name}".endswith(f".{ending}")]
    expected = {name: frozenset([endings[max(fitting, key=len)]])} if fitting else {}
    assert holders(model, endings) == expected
