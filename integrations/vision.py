"""timm's vision transformers: role names for their layers, and S as a picture.

from tokengate.integrations.vision import patch_grid, roles
tokengate.patch(model, targets=roles(model, "q", "k", "v"))
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.integrations.roles import check_known, choose, holders
from tokengate.linears.linear_like import is_linear_like
from tokengate.names import named_modules

ROLES = ("q", "k", "v", "proj", "fc1", "fc2")

_ENDINGS = {
    # ViT, DeiT, BEiT, EVA, SigLIP, DINOv2 and v3, Swin, Hiera, MaxViT, XCiT, MViT...
    "attn.qkv": "q k v",
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.kv": "k v",
    "attn.q_proj": "q",
    "attn.k_proj": "k",
    "attn.v_proj": "v",
    "attn.proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    # Gated: both halves are what fc1 is elsewhere.
    "mlp.fc1_g": "fc1",
    "mlp.fc1_x": "fc1",
    "mlp.w0": "fc1",
    "mlp.w1": "fc1",
    "mlp.w2": "fc2",
    # Not a block's MLP: position biases, pooling heads, CSATv2's channel attention.
    "rel_pos.mlp.fc*": "",
    "attn_pool.mlp.fc*": "",
    "attn.mlp.fc*": "",
    # ConViT, TNT, CrossViT, CoaT, MetaFormers and EfficientFormer, EdgeNeXt, NextViT
    "attn.qk": "q k",
    "attn_in.qk": "q k",
    "attn_in.v": "v",
    "attn_in.proj": "proj",
    "attn_out.qk": "q k",
    "attn_out.v": "v",
    "attn_out.proj": "proj",
    "mlp_in.fc1": "fc1",
    "mlp_in.fc2": "fc2",
    "attn.wq": "q",
    "attn.wk": "k",
    "attn.wv": "v",
    "factoratt_crpe.qkv": "q k v",
    "factoratt_crpe.proj": "proj",
    "token_mixer.qkv": "q k v",
    "token_mixer.proj": "proj",
    "xca.qkv": "q k v",
    "xca.proj": "proj",
    "e_mhsa.q": "q",
    "e_mhsa.k": "k",
    "e_mhsa.v": "v",
    "e_mhsa.proj": "proj",
    # Mixer, gMLP and ResMLP mix tokens in layers of their own, which have no role here.
    "mlp_channels.fc1": "fc1",
    "mlp_channels.fc2": "fc2",
    # LeViT, Gemma 4: the layer is inside a module with its name.
    "attn.qkv.linear": "q k v",
    "attn_downsample.q.ln.linear": "q",
    "attn_downsample.kv.linear": "k v",
    "attn.proj.ln.linear": "proj",
    "attn_downsample.proj.ln.linear": "proj",
    "mlp.ln1.linear": "fc1",
    "mlp.ln2.linear": "fc2",
    "attn.q_proj.linear": "q",
    "attn.k_proj.linear": "k",
    "attn.v_proj.linear": "v",
    "attn.o_proj.linear": "proj",
    "mlp.gate_proj.linear": "fc1",
    "mlp.up_proj.linear": "fc1",
    "mlp.down_proj.linear": "fc2",
    # The ViTs whose attention and MLP run side by side from one layer.
    "blocks.*.in_proj": "q k v fc1",
    "blocks.*.attn_out_proj": "proj",
    "blocks.*.mlp_out_proj": "fc2",
}


def roles(model: nn.Module | str, *asked: str, apart: bool = False) -> list[str]:
    """The full names of the layers in a vision transformer's blocks that hold the roles asked for.

    fc1 and fc2 are the layers into and out of the MLP; the two halves of a gated MLP are both fc1
    (one of them alone is a target by its own name: `"mlp.fc1_g"`). Position biases, pooling heads
    and patch embeddings have no role. Of q, k and v in one layer, the slices that are asked for
    (`attn.qkv.q`); the layer itself if all of them are.

    Args:
        model: a model of timm, or the name of one, which is then looked at as `timm.create_model`
            makes it, without allocating it. Pass the model where you gave it another depth.
        *asked: of "q", "k", "v", "proj", "fc1", "fc2".
        apart: True gives slices also where all of a fused layer is asked for: a modification and a
            gate for each, not one for all.

    Raises:
        TokenGateError: a role is unknown or not in this model, is held fused with one that was
            not asked for in a way that is not known, or is in layers that are never called.
    """
    check_known(asked, ROLES)
    if isinstance(model, str):
        if not timm.is_model(model):
            raise TokenGateError(
                f"timm has no model {model!r}: use a name from timm.list_models(), or pass a model."
            )
        with torch.device("meta"):
            model = timm.create_model(model)
    chosen: list[str] = choose(model, asked, holders(model, _ENDINGS), apart)
    return chosen


def patch_grid(model: Any, is_open: Tensor, layer: str | None = None) -> Tensor:
    """S of one layer as a picture of the patches:

        with tokengate.record(model, positions=True) as rec:
            model(images)
        picture = patch_grid(model, rec.positions[name][0], name)

    Args:
        model: a plain vision transformer of timm (ViT, DeiT, BEiT, EVA-02, SigLIP...) or a Swin.
        is_open: S as it was recorded: (B, N) of a plain one, whose class and register tokens are
            left out here; of a Swin, (B * windows, T) in attention, (B, N) in the MLP.
        layer: the layer's name; only a Swin needs it, whose blocks differ in size and shift. Of
            others it must be one of theirs, if it is given.

    Returns:
        (B, H, W), of the dtype of `is_open`.

    Raises:
        TokenGateError: the model's positions are no grid of patches, or those of `is_open` not
            its own; it has no such layer.
    """
    kind = type(model).__name__
    if isinstance(model, (SwinTransformer, SwinTransformerV2)):
        return _swin_grid(model, is_open, layer)
    if not isinstance(model, (VisionTransformer, VisionTransformerRelPos, Beit, Eva)):
        raise TokenGateError(
            f"patch_grid knows plain vision transformers of timm and its Swins, not a {kind}: "
            "arrange its positions yourself."
        )
    if layer is not None and not any(map(is_linear_like, _around(model, layer))):
        raise TokenGateError(
            f"layer={brief(layer)} is no layer of this {kind}: pass the name of the layer whose S "
            "this is, or leave it out."
        )
    plain: Any = model
    (height, width), prefix = plain.patch_embed.grid_size, plain.num_prefix_tokens
    if is_open.dim() != 2 or is_open.shape[1] != prefix + height * width:
        raise TokenGateError(
            f"patch_grid was given {tuple(is_open.shape)}, but a layer in the blocks of this "
            f"{kind} sees (B, {prefix + height * width}): pass the S of such a layer, recorded at "
            "this image size without patch dropout."
        )
    return is_open[:, prefix:].reshape(-1, height, width)


def _around(model: Any, layer: str | None) -> list[nn.Module]:
    """The modules around that layer, and itself; a slice need be none."""
    parts = layer.split(".") if isinstance(layer, str) else []
    names = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return [module for name, module in named_modules(model) if name in names]


def _swin_grid(model: Any, is_open: Tensor, layer: str | None) -> Tensor:
    blocks: list[Any] = [
        module
        for module in _around(model, layer)
        if isinstance(module, (SwinTransformerBlock, SwinTransformerV2Block))
    ]
    if layer is None or not blocks:
        raise TokenGateError(
            f"layer={brief(layer)} is in no block of this {type(model).__name__}, whose blocks "
            "differ in size and shift: pass the name of the layer whose S this is."
        )
    block = blocks[-1]
    height, width = block.input_resolution
    windowed = "attn" in layer.split(".")
    high, wide = block.window_size if windowed else (height, width)
    # The last windows of a row and of a column may be padded.
    rows, columns = math.ceil(height / high), math.ceil(width / wide)
    if is_open.dim() != 2 or is_open.shape[1] != high * wide or len(is_open) % (rows * columns):
        raise TokenGateError(
            f"patch_grid was given {tuple(is_open.shape)}, but {layer!r} sees "
            f"(B * {rows * columns}, {high * wide}): pass the S of that layer, recorded at this "
            "image size."
        )
    grid = is_open.reshape(-1, rows, columns, high, wide).transpose(2, 3)
    grid = grid.reshape(-1, rows * high, columns * wide)[:, :height, :width]
    return grid.roll(tuple(block.shift_size), (1, 2)) if windowed else grid
