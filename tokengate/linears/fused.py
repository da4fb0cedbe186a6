"""How known models fuse several projections in one linear layer.

Fused layers look alike and are divided differently: q, k and v one after another, or head by head,
or group by group, and CodeGen has v before k. What is listed here was found by running the models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any, cast

from torch import nn

from tokengate.errors import TokenGateError
from tokengate.linears.linear_like import LinearLike, features_of
from tokengate.linears.slices import Slices
from tokengate.names import inside

# From the owner of a layer and its out_features to how these are divided.
_Rule = Callable[[Any, int], Slices]


def known_slices(owner: nn.Module, attribute: str) -> Slices | None:
    """How `owner.attribute` is divided; None where it is not fused, or not known."""
    rule = _RULES.get(place(owner, attribute))
    if rule is None:
        return None
    layer = cast(LinearLike, inside(getattr(owner, attribute)))
    out_features = features_of(layer)[1]
    try:
        slices = rule(owner, out_features)
    # The model's code is of another version than the rule, or somebody has changed the layer.
    except (AttributeError, TokenGateError, ZeroDivisionError):
        return None
    return slices if slices.out_features == out_features else None


def place(owner: nn.Module, attribute: str) -> str:
    """The layer as the rules name it: by the class whose forward divides it."""
    cls = next(c for c in type(owner).__mro__ if "forward" in vars(c))
    # models.phi3.modeling_phi3 says it twice.
    module = re.sub(
        r"^transformers\.models\.(\w+)\.modeling_\1$", r"transformers.\1", cls.__module__
    )
    return f"{module}.{cls.__qualname__}.{attribute}"


def _alike(*names: str, groups: str = "") -> _Rule:
    """The names in turn, as many outputs each; as often as the owner's attribute `groups` says."""

    def rule(owner: Any, out_features: int) -> Slices:
        number = attrgetter(groups)(owner) if groups else 1
        return Slices(groups=number, **dict.fromkeys(names, out_features // number // len(names)))

    return rule


def _phi3(owner: Any, out_features: int) -> Slices:
    kv = owner.num_key_value_heads * owner.head_dim
    return Slices(q=out_features - 2 * kv, k=kv, v=kv)


def _falcon(owner: Any, out_features: int) -> Slices:
    heads, size = owner.num_heads, owner.head_dim
    if owner.new_decoder_architecture:
        groups = owner.num_kv_heads
        return Slices(groups=groups, q=heads // groups * size, k=size, v=size)
    if owner.multi_query:
        return Slices(q=heads * size, k=size, v=size)
    return Slices(groups=heads, q=size, k=size, v=size)


def _gpt_bigcode(owner: Any, out_features: int) -> Slices:
    if owner.multi_query:
        return Slices(q=owner.embed_dim, k=owner.kv_dim, v=owner.kv_dim)
    return Slices(groups=owner.num_heads, q=owner.head_dim, k=owner.head_dim, v=owner.head_dim)


def _gpt2(owner: Any, out_features: int) -> Slices:
    names = ("k", "v") if owner.is_cross_attention else ("q", "k", "v")
    return Slices(**dict.fromkeys(names, owner.embed_dim))


def _codegen(owner: Any, out_features: int) -> Slices:
    size = out_features // 12  # in four blocks, as its first training was sharded
    return Slices(groups=4, q=size, v=size, k=size)


def _kv_b(owner: Any, out_features: int) -> Slices:
    return Slices(groups=owner.num_heads, k=owner.qk_nope_head_dim, v=owner.v_head_dim)


def _parallel_vit(owner: Any, out_features: int) -> Slices:
    return Slices(**dict(zip(("fc1", "q", "k", "v"), owner.in_split, strict=True)))


def _maxvit(owner: Any, out_features: int) -> Slices:
    groups = owner.num_heads if owner.head_first else 1
    return Slices(groups=groups, **dict.fromkeys("qkv", out_features // groups // 3))


def _glu(owner: Any, out_features: int) -> Slices:
    names = ("up", "gate") if owner.gate_last else ("gate", "up")
    return Slices(**dict.fromkeys(names, out_features // 2))


_QKV, _GATE_UP = _alike("q", "k", "v"), _alike("gate", "up")
_BY_HEAD = _alike("q", "k", "v", groups="num_heads")

_TIMM: dict[str, _Rule] = {
    "layers.attention.Attention.qkv": _QKV,
    "layers.attention.AttentionRope.qkv": _QKV,
    "layers.diff_attention.DiffAttention.qkv": _QKV,
    "layers.mlp.GluMlp.fc1": _glu,
    "models.beit.Attention.qkv": _QKV,
    "models.cait.TalkingHeadAttn.qkv": _QKV,
    "models.coat.FactorAttnConvRelPosEnc.qkv": _QKV,
    "models.convit.GPSA.qk": _alike("q", "k"),
    "models.convit.MHSA.qkv": _QKV,
    "models.davit.WindowAttention.qkv": _QKV,
    "models.eva.EvaAttention.qkv": _QKV,
    "models.hiera.MaskUnitAttention.qkv": _QKV,
    "models.hieradet_sam2.MultiScaleAttention.qkv": _QKV,
    "models.maxxvit.AttentionCl.qkv": _maxvit,
    "models.metaformer.Attention.qkv": _QKV,
    "models.mvitv2.MultiScaleAttention.qkv": _QKV,
    "models.nest.Attention.qkv": _QKV,
    "models.pvt_v2.Attention.kv": _alike("k", "v"),
    "models.swin_transformer.WindowAttention.qkv": _QKV,
    "models.swin_transformer_v2.WindowAttention.qkv": _QKV,
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention.qkv": _QKV,
    "models.tiny_vit.Attention.qkv": _BY_HEAD,
    "models.twins.GlobalSubSampleAttn.kv": _alike("k", "v"),
    "models.twins.LocallyGroupedAttn.qkv": _QKV,
    "models.vision_transformer.ParallelScalingBlock.in_proj": _parallel_vit,
    "models.vision_transformer_relpos.RelPosAttention.qkv": _QKV,
    "models.vision_transformer_sam.Attention.qkv": _QKV,
}
_TRANSFORMERS: dict[str, _Rule] = {
    "blip_2.Blip2Attention.qkv": _QKV,
    "bloom.BloomAttention.query_key_value": _BY_HEAD,
    "codegen.CodeGenAttention.qkv_proj": _codegen,
    "deberta.DisentangledSelfAttention.in_proj": _alike(
        "q", "k", "v", groups="num_attention_heads"
    ),
    "deepseek_v2.DeepseekV2Attention.kv_b_proj": _kv_b,
    "deepseek_v3.DeepseekV3Attention.kv_b_proj": _kv_b,
    "falcon.FalconAttention.query_key_value": _falcon,
    "glm.GlmMLP.gate_up_proj": _GATE_UP,
    "glm4.Glm4MLP.gate_up_proj": _GATE_UP,
    "gpt2.GPT2Attention.c_attn": _gpt2,
    "gpt_bigcode.GPTBigCodeAttention.c_attn": _gpt_bigcode,
    "gpt_neox.GPTNeoXAttention.query_key_value": _alike(
        "q", "k", "v", groups="config.num_attention_heads"
    ),
    "granitemoehybrid.GraniteMoeHybridMLP.input_linear": _GATE_UP,
    "granitemoeshared.GraniteMoeSharedMLP.input_linear": _GATE_UP,
    "modernbert.ModernBertAttention.Wqkv": _QKV,
    "modernbert.ModernBertMLP.Wi": _GATE_UP,
    "mpt.MptAttention.Wqkv": _QKV,
    "persimmon.PersimmonAttention.query_key_value": _BY_HEAD,
    "phi3.Phi3Attention.qkv_proj": _phi3,
    "phi3.Phi3MLP.gate_up_proj": _GATE_UP,
    "qwen2_vl.VisionAttention.qkv": _QKV,
    "qwen2_5_vl.Qwen2_5_VLVisionAttention.qkv": _QKV,
    "qwen3_vl.Qwen3VLVisionAttention.qkv": _QKV,
    "sam.SamVisionAttention.qkv": _QKV,
    "sam.SamVisionSdpaAttention.qkv": _QKV,
}
_RULES = {f"timm.{key}": rule for key, rule in _TIMM.items()} | {
    f"transformers.{key}": rule for key, rule in _TRANSFORMERS.items()
}
