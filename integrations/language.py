"""Role names for the models of transformers: which layers are q, k, v, o, up, down and gate.

    from tokengate.integrations.language import roles
    tokengate.patch(model, targets=roles(model, "q", "v"))

The families name these layers differently, and transformers renamed many of them between versions;
here the layers that the model really has are looked at.
"""

from __future__ import annotations

from torch import nn

from tokengate import TokenGateError
from tokengate.integrations.roles import check_known, choose, holders
from tokengate.names import named_modules

ROLES = ("q", "k", "v", "o", "up", "down", "gate")

#: The target sets of the paper's Tables 6 to 8: `roles(model, *PAPER_TARGETS["glue"])`.
PAPER_TARGETS = {
    "commonsense": ("q", "k", "v", "up", "down"),  # LLaMA3-8B
    "visual_instruction": ("q", "k", "v", "o", "up", "down", "gate"),  # LLaVA-1.5-7B
    "glue": ("q", "k", "v", "o", "up"),  # DeBERTaV3; its I, the intermediate layer, is "up"
}

# By what the layers are called, not by model_type: some fifty families share Llama's names. Where
# families disagree on a name, the name of the owner tells them apart.
_ENDINGS = {
    # Llama, Qwen, Mistral, Gemma, Phi, GLM, OPT, BART, Whisper, CLIP, ViT...
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "attn.out_proj": "o",
    "*_attn.out_proj": "o",
    "attention.out_proj": "o",
    "cross_attention.out_proj": "o",
    "linear_attn.out_proj": "",  # Qwen3-Next: after a state space, whose q and k are fused with z
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "layers.*.fc1": "up",
    "layers.*.fc2": "down",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    # BERT, RoBERTa, ELECTRA, ESM, DeBERTa (v1 fuses per head), ALBERT, VideoMAE
    "self.query": "q",
    "self.key": "k",
    "self.value": "v",
    "self.query_proj": "q",
    "self.key_proj": "k",
    "self.value_proj": "v",
    "self.in_proj": "q k v",
    "attention.query": "q",
    "attention.key": "k",
    "attention.value": "v",
    "attention.output.dense": "o",
    "crossattention.output.dense": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
    "albert_layers.*.attention.dense": "o",
    "albert_layers.*.ffn": "up",
    "albert_layers.*.ffn_output": "down",
    # Longformer's encoder-decoder
    "longformer_self_attn.query": "q",
    "longformer_self_attn.key": "k",
    "longformer_self_attn.value": "v",
    "self_attn.output": "o",
    # DistilBERT, MPNet, Funnel, XLNet (whose attention has parameters, not layers), ModernBERT
    "attention.q_lin": "q",
    "attention.k_lin": "k",
    "attention.v_lin": "v",
    "attention.out_lin": "o",
    "ffn.lin1": "up",
    "ffn.lin2": "down",
    "attention.attn.q": "q",
    "attention.attn.k": "k",
    "attention.attn.v": "v",
    "attention.attn.o": "o",
    "attention.q_head": "q",
    "attention.k_head": "k",
    "attention.v_head": "v",
    "attention.post_proj": "o",
    "ffn.linear_1": "up",
    "ffn.linear_2": "down",
    "ff.layer_1": "up",
    "ff.layer_2": "down",
    "attn.Wqkv": "q k v",
    "attn.Wo": "o",
    "mlp.Wi": "gate up",
    "mlp.Wo": "down",
    # T5, UMT5, LongT5, Switch
    "*Attention.q": "q",
    "*Attention.k": "k",
    "*Attention.v": "v",
    "*Attention.o": "o",
    "wi": "up",
    "wi_0": "gate",
    "wi_1": "up",
    "wo": "down",
    # NLLB-MoE
    "experts.*.fc1": "up",
    "experts.*.fc2": "down",
    # GPT-2, GPT-BigCode, GPT-Neo, StarCoder2, GPT-J, CodeGen
    "attn.c_attn": "q k v",
    "crossattention.q_attn": "q",
    "crossattention.c_attn": "k v",
    "attn.c_proj": "o",
    "crossattention.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    "mlp.fc_in": "up",
    "mlp.fc_out": "down",
    # GPT-NeoX, Bloom, Falcon, Persimmon, Phi
    "query_key_value": "q k v",
    "attention.dense": "o",
    "self_attention.dense": "o",
    "self_attn.dense": "o",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    # Phi-3, GLM-4, CodeGen, MiniMax, Granite hybrids, LFM2
    "qkv_proj": "q k v",
    "gate_up_proj": "gate up",
    "shared_mlp.input_linear": "gate up",
    "shared_mlp.output_linear": "down",
    "feed_forward.w1": "gate",
    "feed_forward.w3": "up",
    "feed_forward.w2": "down",
    # DeepSeek: q in two factors, k and v from one
    "q_a_proj": "q",
    "q_b_proj": "q",
    "kv_a_proj_with_mqa": "k v",
    "kv_b_proj": "k v",
    # Wav2Vec2, HuBERT, WavLM; SAM; the vision side of Qwen-VL and BLIP-2
    "feed_forward.intermediate_dense": "up",
    "feed_forward.output_dense": "down",
    "attn.qkv": "q k v",
    "self_attn.qkv": "q k v",
    "attn.proj": "o",
    "self_attn.projection": "o",
    "mlp.lin1": "up",
    "mlp.lin2": "down",
    "mlp.linear_fc1": "up",
    "mlp.linear_fc2": "down",
}

# Where a model has a text side and others (LLaVA, Qwen-VL, CLIP...), it is called so.
_TEXT_SIDES = ("language_model", "text_model")


def roles(model: nn.Module, *asked: str, experts: bool = True, apart: bool = False) -> list[str]:
    """The full names of the layers of `model` that hold the roles `asked` for.

    "up", "gate" and "down" are the layers of the MLP; without a gate, the first is "up". In an
    encoder-decoder, q, k, v and o are those of self-attention and of cross-attention. Of a model
    with several sides, the layers of its text side; pass the vision tower itself for its layers.
    Of a layer that holds several roles fused (`qkv_proj`), the slices that are asked for
    (`qkv_proj.q`); the layer itself if all of them are.

    Args:
        model: a model of transformers, or a part of one.
        *asked: of "q", "k", "v", "o", "up", "down", "gate".
        experts: False leaves the experts of a mixture out of "up", "down" and "gate": the dense
            and the shared layers alone. Experts in 3-D parameters have no roles, but targets of
            their own, "experts.gate_up_proj" and "experts.down_proj": there only False works.
        apart: True gives slices also where all of a fused layer is asked for: a modification and a
            gate for each, not one for all.

    Raises:
        TokenGateError: a role is unknown or not in this model, is held fused with one that was
            not asked for in a way that is not known, or is in layers that no patch can reach.
    """
    check_known(asked, ROLES)
    sides = [n for n, _ in named_modules(model) if n.rpartition(".")[2] in _TEXT_SIDES]
    held = {
        name: roles
        for name, roles in holders(model, _ENDINGS).items()
        if not sides or any(name.startswith(f"{side}.") for side in sides)
    }
    in_mlp = [role for role in asked if role in ("up", "down", "gate")]
    if not experts:
        held = {name: roles for name, roles in held.items() if "experts" not in name.split(".")}
    elif in_mlp and (stacked := _stacked_experts(model)):
        rest = any(roles & set(in_mlp) for roles in held.values())
        remedy = "pass experts=False for the dense and shared layers" if rest else "leave it out"
        raise TokenGateError(
            f"the role {in_mlp[0]!r} was asked of a {type(model).__name__}, whose experts in "
            f"{stacked!r} are stacked in 3-D parameters, not linear layers: {remedy}."
        )
    chosen: list[str] = choose(model, asked, held, apart)
    return chosen


def _stacked_experts(model: nn.Module) -> str | None:
    """The first module that holds the weights of all its experts in parameters of its own."""
    name: str
    for name, module in named_modules(model):
        own = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        if own and "Expert" in type(module).__name__:
            return name
    return None
