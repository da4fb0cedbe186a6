"""The architectures of transformers."""

from __future__ import annotations

import importlib
from functools import partial

import torch
import transformers
from architectures import Architecture, Refusal, images, tokens

from tokengate.integrations.language import PAPER_TARGETS, roles

ATTENTION = ("q", "k", "v", "o")
MLP = ("up", "down")
GATED = ("up", "down", "gate")
ALL = ATTENTION + GATED
PLAIN = ATTENTION + MLP

TEXT: list[Architecture] = []

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# As GPT-2 and its relatives name them.
GPT_SIZES = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = {"num_key_value_heads": 2}
MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def output(result):
    """The first tensor that a head or an encoder returns."""
    return result.logits if "logits" in result else result[0]


def from_config(model_type, head="AutoModelForCausalLM", sizes=SIZES, **options):
    """A builder of the model that `head` names."""

    def build():
        settings = transformers.CONFIG_MAPPING[model_type](**{**sizes, **options})
        kind = getattr(transformers, head)
        return kind.from_config(settings) if head.startswith("Auto") else kind(settings)

    return build


def run_padded(model):
    mask = torch.ones_like(tokens())
    mask[1, 7:] = 0
    return output(model(input_ids=tokens(), attention_mask=mask, return_dict=True))


def text(name, model_type, what, *args, run=run_padded, find=roles, **options):
    """A text model; `args` are the head and the sizes, `options` the config's."""
    build = from_config(model_type, *args, **options)
    TEXT.append(Architecture(f"transformers/{name}", build, run, what, find))


def run_unmasked(model):
    return output(model(input_ids=tokens(), return_dict=True))


text("llama", "llama", ALL, **GROUPED)
text("qwen2", "qwen2", ALL, **GROUPED)
text("qwen3", "qwen3", ALL, **GROUPED, head_dim=8)
text("mistral", "mistral", ALL, **GROUPED, sliding_window=4)
text("gemma2", "gemma2", ALL, **GROUPED, head_dim=8)
text("gemma3", "gemma3_text", ALL, **GROUPED, head_dim=8, sliding_window=4)
text("olmo2", "olmo2", ALL, **GROUPED)
text("cohere", "cohere", ALL, **GROUPED)
text("cohere2", "cohere2", ALL, **GROUPED, sliding_window=4)
text("stablelm", "stablelm", ALL, **GROUPED)
text("nemotron", "nemotron", PLAIN, **GROUPED)
text("starcoder2", "starcoder2", PLAIN, **GROUPED)
text("phi", "phi", PLAIN)
text("phi3", "phi3", ALL, **GROUPED, pad_token_id=0)
text("glm4", "glm4", ALL, **GROUPED, head_dim=8, pad_token_id=0)
text("glm", "glm", ALL, **GROUPED, head_dim=8, pad_token_id=0)
text("gpt_neox", "gpt_neox", PLAIN)
text(
    "gpt_neo",
    "gpt_neo",
    PLAIN,
    sizes={"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4},
    attention_types=[[["global", "local"], 1]],
    max_position_embeddings=64,
)
text("gptj", "gptj", PLAIN, sizes=GPT_SIZES, rotary_dim=4)
text("codegen", "codegen", PLAIN, sizes=GPT_SIZES, rotary_dim=4)
text("gpt2", "gpt2", PLAIN, sizes=GPT_SIZES)
text("gpt_bigcode", "gpt_bigcode", PLAIN, sizes=GPT_SIZES)
BLOOM = {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}
text("bloom", "bloom", PLAIN, sizes=BLOOM)
text("falcon-7b", "falcon", PLAIN, multi_query=True, new_decoder_architecture=False)
text("falcon-40b", "falcon", PLAIN, new_decoder_architecture=True, num_kv_heads=2)
text(
    "mpt",
    "mpt",
    PLAIN,
    sizes={"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
)
text("opt", "opt", PLAIN, ffn_dim=64, word_embed_proj_dim=16)
text("persimmon", "persimmon", PLAIN)
text("mixtral", "mixtral", ATTENTION, **GROUPED, num_local_experts=4)
text("qwen3_moe", "qwen3_moe", ATTENTION, **MOE, head_dim=8)
text("olmoe", "olmoe", ATTENTION, **GROUPED, num_experts=4, num_experts_per_tok=2)
text("gpt_oss", "gpt_oss", ATTENTION, **GROUPED, head_dim=8, num_local_experts=4)
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
text("deepseek_v3", "deepseek_v3", ATTENTION, **DEEPSEEK)
text("deepseek_v2", "deepseek_v2", ATTENTION, **DEEPSEEK)
# The dense and the shared layers of mixtures whose experts are 3-D parameters.
dense = partial(roles, experts=False)
text("deepseek_v3-dense", "deepseek_v3", GATED, find=dense, **DEEPSEEK)
QWEN2_MOE = {**MOE, "shared_expert_intermediate_size": 16}
SHARED = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
SHARED |= {"shared_intermediate_size": 32}
text("granitemoeshared-dense", "granitemoeshared", ALL, find=dense, **SHARED)
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
text(
    "granitemoehybrid-dense",
    "granitemoehybrid",
    ALL,
    find=dense,
    layers_block_type=["mamba", "attention"],
    **SHARED,
    **MAMBA,
)
text("qwen2_moe-dense", "qwen2_moe", ALL, find=dense, **QWEN2_MOE)
LLAMA4 = {**GROUPED, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 64}
text("llama4-dense", "llama4_text", ALL, find=dense, **LLAMA4, pad_token_id=0)
text("lfm2", "lfm2", ALL, **GROUPED, layer_types=["conv", "full_attention"], block_dim=32)
GRIFFIN = {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4}
text("recurrent_gemma", "recurrent_gemma", ALL, **GRIFFIN)
text(
    "falcon_h1",
    "falcon_h1",
    ALL,
    **GROUPED,
    mamba_d_ssm=32,
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_d_state=4,
    mamba_n_groups=1,
)

text("bert", "bert", PLAIN, "BertForMaskedLM")
text("roberta", "roberta", PLAIN, "RobertaForMaskedLM", pad_token_id=0)
text("albert", "albert", PLAIN, "AlbertForMaskedLM", embedding_size=16)
text("electra", "electra", PLAIN, "ElectraForPreTraining", embedding_size=16)
text("esm", "esm", PLAIN, "EsmForMaskedLM", pad_token_id=1, position_embedding_type="rotary")
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
text(
    "deberta-v3",
    "deberta-v2",
    PAPER_TARGETS["glue"],
    "DebertaV2ForSequenceClassification",
    share_att_key=True,
    position_biased_input=False,
    type_vocab_size=0,
    **DEBERTA,
)
text("deberta-v2", "deberta-v2", PLAIN, "DebertaV2Model", share_att_key=False, **DEBERTA)
text("deberta-v1", "deberta", PLAIN, "DebertaModel", **DEBERTA)
DISTILBERT = {"vocab_size": 99, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
text("distilbert", "distilbert", PLAIN, "DistilBertForMaskedLM", sizes=DISTILBERT)
MODERN = {"local_attention": 4, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
text("modernbert", "modernbert", ALL, "ModernBertForMaskedLM", **MODERN)
text("mpnet", "mpnet", PLAIN, "MPNetModel")
text("layoutlm", "layoutlm", PLAIN, "LayoutLMModel")
text("roformer", "roformer", PLAIN, "RoFormerModel", embedding_size=32)
text("big_bird", "big_bird", PLAIN, "BigBirdModel", attention_type="original_full")
text("mobilebert", "mobilebert", PLAIN, "MobileBertModel", embedding_size=16)
text("longformer", "longformer", PLAIN, "LongformerModel", attention_window=4)
text("fnet", "fnet", MLP, "FNetModel", run=run_unmasked)
XLNET = {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
text("xlnet", "xlnet", MLP, "XLNetLMHeadModel", sizes=XLNET)
FUNNEL = {"vocab_size": 99, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
text("funnel", "funnel", PLAIN, "FunnelModel", sizes=FUNNEL, block_sizes=[1, 1])


def run_pair(model):
    return output(
        model(input_ids=tokens(16), decoder_input_ids=tokens(12)[:, 5:], return_dict=True)
    )


T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
GENERATION = "ForConditionalGeneration"
text("t5", "t5", PLAIN, f"T5{GENERATION}", T5, run=run_pair)
text("t5-v1_1", "t5", ALL, f"T5{GENERATION}", T5, run=run_pair, feed_forward_proj="gated-gelu")
text("umt5", "umt5", ALL, f"UMT5{GENERATION}", T5, run=run_pair)
text("longt5", "longt5", PLAIN, f"LongT5{GENERATION}", T5, run=run_pair, local_radius=3)
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
SHORT = {"max_position_embeddings": 64}
text("bart", "bart", PLAIN, f"Bart{GENERATION}", BART, run=run_pair, **SHORT)
text("pegasus", "pegasus", PLAIN, f"Pegasus{GENERATION}", BART, run=run_pair, **SHORT)
text(
    "led",
    "led",
    PLAIN,
    f"LED{GENERATION}",
    BART,
    run=run_pair,
    attention_window=4,
    max_encoder_position_embeddings=64,
    max_decoder_position_embeddings=64,
)
# Linear experts: with two of them and 32 tokens, each gets some.
text(
    "switch_transformers",
    "switch_transformers",
    PLAIN,
    f"SwitchTransformers{GENERATION}",
    {**T5, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    run=run_pair,
    num_experts=2,
    expert_capacity=64,
)


def other(name, build, run, what):
    TEXT.append(Architecture(f"transformers/{name}", build, run, what, roles))


PIXELS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def vision(name, model_type, what, head, **options):
    """A vision model of transformers, whose names are those of its text models."""

    build = from_config(model_type, head, PIXELS, **options)
    other(name, build, lambda model: output(model(pixel_values=images())), what)


vision("vit", "vit", PLAIN, "ViTForImageClassification")
vision("dinov2-swiglu", "dinov2", ALL, "Dinov2Model", use_swiglu_ffn=True)
vision("dinov3", "dinov3_vit", PLAIN, "DINOv3ViTModel")
vision("clip-vision", "clip_vision_model", PLAIN, "CLIPVisionModel")
vision("siglip-vision", "siglip_vision_model", PLAIN, "SiglipVisionModel", vision_use_head=False)


def build_llava():
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**PIXELS),
            text_config=transformers.LlamaConfig(**SIZES, **GROUPED),
            image_token_id=98,
        )
    )


def run_llava(model):
    ids = tokens(24)
    ids[:, 2:18] = 98
    return output(model(input_ids=ids, pixel_values=images()))


other("llava", build_llava, run_llava, PAPER_TARGETS["visual_instruction"])


def build_clip():
    sides = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**sides, "eos_token_id": 98}, vision_config=PIXELS, projection_dim=24
        )
    )


def run_clip(model):
    ids = tokens()
    ids[:, -1] = 98
    return model(input_ids=ids, pixel_values=images()).logits_per_image


other("clip-text", build_clip, run_clip, PLAIN)


def build_whisper():
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **BART,
            num_mel_bins=8,
            max_source_positions=30,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


def run_whisper(model):
    sound = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(5))
    return output(model(input_features=sound, decoder_input_ids=tokens()))


other("whisper", build_whisper, run_whisper, PLAIN)

SOUND = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def run_sound(model):
    return output(model(torch.randn(2, 800, generator=torch.Generator().manual_seed(5))))


other("wav2vec2", from_config("wav2vec2", "Wav2Vec2Model", SOUND), run_sound, PLAIN)
other("hubert", from_config("hubert", "HubertModel", SOUND), run_sound, PLAIN)


def tower(family, config, model, run, what, **settings):
    """The vision side of a model, which has no entry among the automatic classes."""

    def build():
        code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        return getattr(code, model)._from_config(getattr(code, config)(**settings))

    other(f"{family}-vision", build, run, what)


def run_packed(model):
    patches = torch.randn(48, 96, generator=torch.Generator().manual_seed(5))
    return output(model(patches, grid_thw=torch.tensor([[1, 4, 4], [1, 4, 8]])))


def run_images(model):
    return output(model(pixel_values=images(64)))


QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "in_channels": 3}
QWEN |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_NEW = {**QWEN, "intermediate_size": 64, "out_hidden_size": 32}
tower(
    "qwen2_vl",
    "Qwen2VLVisionConfig",
    "Qwen2VisionTransformerPretrainedModel",
    run_packed,
    PLAIN,
    **QWEN,
    embed_dim=32,
)
tower(
    "qwen2_5_vl",
    "Qwen2_5_VLVisionConfig",
    "Qwen2_5_VisionTransformerPretrainedModel",
    run_packed,
    ALL,
    **QWEN_NEW,
    window_size=16,
    fullatt_block_indexes=[1],
)
tower(
    "qwen3_vl",
    "Qwen3VLVisionConfig",
    "Qwen3VLVisionModel",
    run_packed,
    PLAIN,
    **QWEN_NEW,
    deepstack_visual_indexes=[0],
    num_position_embeddings=16,
)
PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
    "initializer_range": 0.02,
}
SAM = {"window_size": 3, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 64}
tower("sam", "SamVisionConfig", "SamVisionModel", run_images, PLAIN, **PATCHES, **SAM)
BLIP_2 = ("blip_2", "Blip2VisionConfig", "Blip2VisionModel")
tower(*BLIP_2, run_images, PLAIN, **PATCHES, intermediate_size=64)


REFUSED: list[Refusal] = []


def refused(name, what, says, *args, **options):
    build = from_config(name, *args, **options)
    REFUSED.append(Refusal(f"transformers/{name}", build, what, says, roles))


refused("deepseek_v3", ("v",), "kv_a_proj_with_mqa' .* k was not asked for", **DEEPSEEK)
refused("xlnet", ("q",), "known to hold the role 'q', it has the roles down, up", sizes=XLNET)
refused("bert", ("gate",), "known to hold the role 'gate', it has the roles down, k, o, q, up, v")
EXPERTS = "whose experts in '.*experts.*' are stacked in 3-D parameters, not linear layers"
refused("mixtral", ("up",), f"'up' was asked .* {EXPERTS}: leave it out", **GROUPED)
refused("qwen3_moe", ("q", "gate"), f"'gate' .* {EXPERTS}: leave it out", **MOE, head_dim=8)
refused("gpt_oss", ("down",), f"{EXPERTS}: leave it out", **GROUPED, head_dim=8)
refused("deepseek_v3", ("up",), f"{EXPERTS}: pass experts=False for the dense", **DEEPSEEK)
refused("llama4_text", ("down",), f"{EXPERTS}: pass experts=False", **LLAMA4, pad_token_id=0)
NEVER = "is never called, because its owner reads the weight itself, so that a patch would"
TWO_RANKS = {"pretraining_tp": 2, "slow_but_exact": True}
refused("bloom", ("o",), f"self_attention.dense' .* {NEVER}", sizes=BLOOM, **TWO_RANKS)
refused("bloom", ("down",), f"dense_4h_to_h' .* {NEVER}", sizes=BLOOM, **TWO_RANKS)
refused("wavlm", ("q",), f"attention.q_proj' .* {NEVER}", "WavLMModel", SOUND)
