"""A configuration of transformers made small: the same architecture with few layers and channels.

Widths are all divided by one number, so that what must fit still fits: a hidden size and its heads,
a projection and what it projects to. Which fields are widths, layers or ids is told by their names.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Way(NamedTuple):
    """How a configuration is made small.

    Attributes:
        factor: by which widths are divided.
        images: whether images are made small, too.
        heads: whether there are fewer heads, instead of narrower ones: rotations may be sized.
    """

    factor: int
    images: bool
    heads: bool = False


#: In the order of trying.
WAYS = (
    *(Way(16, True), Way(8, True, True), Way(8, True), Way(16, False), Way(8, False, True)),
    *(Way(4, False), Way(1, True), Way(1, False)),
)
VOCABULARY, LAYERS, EXPERTS, CHOSEN = 128, 2, 4, 2

# Counts of layers, which become two, and lists with an entry for each stage.
_LAYERS = re.compile(
    r"(^|_)(num_)?(hidden_|encoder_|decoder_|attention_|base_|block_|fusion_|mixer_|vision_|text_)*"
    r"(layers?|depth|blocks)$|^n_layers?$|^num_\w*_(layers|blocks)$|^num_layers_\w+$|_layers$|^L$"
)
_NO_LAYERS = re.compile(
    r"max_window|first_k|every|freq|hidden_layers?_idx|skip|shared|sparse|mtp|per_|feat_extract"
)
_STAGES = re.compile(r"^(depths|layer_depths|num_blocks|layers|encoder_blocks|decoder_blocks)$")
_BY_LAYER = re.compile(r"(layer_types|layers_block_type|block_types|attention_types|_layer_types)$")
_EXPERTS = re.compile(
    r"^(n|num|moe_num|num_local|n_routed|num_routed|router_num)_?(local_|routed_)?experts$"
)
_CHOSEN = re.compile(r"experts_per_tok|^(moe_)?top_?k$|^num_selected_experts$|^moe_k$|^topk$")
_GROUPS = re.compile(r"^(n_group|topk_group|moe_num_groups|num_expert_group)$")
# With fewer heads of their own width.
_HEADS = re.compile(r"(^|_)(num_|n_)?(\w+_)?heads?$|^num_\w*key_value_heads$|^n_heads?$")
_HEAD_WIDTH = re.compile(r"head_dim|mrope_section|_d_head$|^d_kv$|d_head$")
_IMAGES, _POSITIONS = ("image_size", "img_size", "input_size"), 100
# How many layers are dense before those with experts begin.
_FIRST_SPARSE = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
_WIDTH = re.compile(
    r"(_d_head|_size|_sizes|_dims?|_channels|_rank|_width|_inner|_features|_embd|_units)$"
    r"|^(d_\w+|dim|dims|width|embed_dims?|n_embd|channels|hidden|mrope_section|conv_dim|inner_dim)$"
)
_NO_WIDTH = re.compile(
    r"image|patch|tubelet|kernel|window|chunk|vocab|batch|grid|stride|pool|position|block_size|segment|"
    r"sample|tile|crop|context|merge|temporal|mel|^num_|in_channels|input_channels|bucket|group|"
    r"type_|label|class|spatial|cache|queue|codebook_size|resolution|lookback|num_feat|conv_width|"
    r"input_size|n_channels|frame|conv_size|crop|step|max_|head_channels|feature_size|output_size|"
    r"input_dim|cardinality|cond_dim$|action|state_dim|act_dim|vq_|down_|up_size|local_size|memory_size"
)
_IDS = re.compile(r"_(token_)?(ids?|index)$|_token$")


def shrunken(config: Any, way: Way, special: dict[str, Any]) -> Any:
    """A new configuration of the same class, of which `special` has fields that are not guessed."""
    return type(config)(**_fields(config, way) | special)


def _fields(config: Any, way: Way) -> dict[str, Any]:
    parts = {name for name in type(config).sub_configs if getattr(config, name, None) is not None}
    fields = config.to_dict()
    for name in ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype"):
        fields.pop(name, None)
    # Which follow from others.
    for name in ("id2label", "label2id", "out_features", "out_indices", "stage_names"):
        fields.pop(name, None)
    layers = _kept_layers(fields)
    before = next((fields[n] for n in fields if n in ("num_hidden_layers", "num_layers")), None)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in parts:
            part = getattr(config, name)
            own = part.model_type
            small[name] = {**_fields(part, way), **({"model_type": own} if own else {})}
        elif way.images and name in _IMAGES and value:
            small[name] = _small_image(value, fields.get("patch_size"))
        elif name == "per_layer_config" and value:
            small[name] = {k: v for k, v in value.items() if int(k) < len(layers)}
        elif isinstance(value, (list, tuple)) and len(value) == before:
            own = [value[i] for i in layers if i < len(value)]
            small[name] = _shrunk(name, own, way, [*range(len(own))])
        else:
            small[name] = _shrunk(name, value, way, layers)
    return small


def _kept_layers(fields: dict[str, Any]) -> list[int]:
    """The numbers of the layers that stay: the first of each kind, and two at least."""
    for name, value in fields.items():
        if _BY_LAYER.search(name) and isinstance(value, (list, tuple)) and value:
            kinds = list(map(str, value))
            first = sorted({kinds.index(kind) for kind in kinds})
            return first if len(first) > 1 else [*range(min(LAYERS, len(value)))]
    return [*range(LAYERS)]


def _shrunk(name: str, value: Any, way: Way, layers: list[int]) -> Any:
    if value is None and (_EXPERTS.search(name) or name == "num_experts_per_tok"):
        return EXPERTS if _EXPERTS.search(name) else CHOSEN
    if isinstance(value, (list, tuple)):
        return _shrunk_list(name, list(value), way, layers)
    if type(value) is not int:
        if isinstance(value, dict) and "mrope_section" in value and not way.heads:
            section = _shrunk_list("mrope_section", value["mrope_section"], way, layers)
            return {**value, "mrope_section": section}
        return value
    if name in ("max_source_positions", "max_target_positions"):
        return min(value, _POSITIONS)
    if "vocab_size" in name or name.endswith("codebook_size"):
        return min(value, VOCABULARY)
    if _IDS.search(name):
        return value if value < VOCABULARY - 28 else VOCABULARY - 28 + _place(name)
    if _EXPERTS.search(name):
        return min(value, EXPERTS)
    if _CHOSEN.search(name):
        return min(value, CHOSEN)
    if _GROUPS.search(name):
        return 1
    if name in _FIRST_SPARSE:
        return min(value, 1)
    if _LAYERS.search(name) and not _NO_LAYERS.search(name):
        return min(value, len(layers))
    return max(1, value // way.factor) if _is_divided(name, way) else value


def _is_divided(name: str, way: Way) -> bool:
    if _HEADS.search(name):
        return way.heads
    if way.heads and _HEAD_WIDTH.search(name):
        return False
    return bool(_WIDTH.search(name)) and not _NO_WIDTH.search(name)


def _small_image(size: Any, patch: Any) -> Any:
    """Of four patches a side, or 64 pixels; less where it was less."""
    patch = patch if isinstance(patch, int) else 16
    small = 4 * patch if patch > 4 else 64
    if isinstance(size, (list, tuple)):
        return [min(each, small) for each in size]
    return min(size, small) if isinstance(size, int) else size


def _place(name: str) -> int:
    """The same small number for a name each time, another one for most others."""
    return sum(name.encode()) % 28


def _shrunk_list(name: str, value: list[Any], way: Way, layers: list[int]) -> Any:
    if _BY_LAYER.search(name):
        return [value[i] for i in layers if i < len(value)]
    numbers = bool(value) and all(type(each) is int for each in value)
    if numbers and _STAGES.search(name):
        return [min(each, 1) for each in value]
    if numbers and _IDS.search(name):
        return [_shrunk(name, each, way, layers) for each in value]
    if numbers and _is_divided(name, way):
        return [max(1, each // way.factor) for each in value]
    return value
