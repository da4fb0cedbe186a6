"""open_clip: the layers of the image tower and of the text tower, by role.

    from tokengate.integrations.clip import clip_targets, merge_towers, split_towers

    split_towers(model)
    tokengate.patch(model, clip_targets(model, "image", "q", "v"))
    ...
    merge_towers(tokengate.unpatch(model))

open_clip's own towers hold q, k and v as parameters of `nn.MultiheadAttention` (see `attention`);
`split_towers` makes layers of them. Other towers need none of it, and it leaves them as they are,
so that the same lines do for every model.

`encode_image` and `encode_text` may be called alone. Only `model(image, text)` is checked for
layers that were never called, as `tokengate.verify(model, image, text)` is. open_clip's own text
tower has no padding mask: every one of its positions counts, up to the context length.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import nn

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.integrations import language, vision
from tokengate.integrations.attention import SplitAttention, merge_attention, split_attention
from tokengate.integrations.roles import check_known
from tokengate.linears.owners import reads_weight

_Model = TypeVar("_Model", bound=nn.Module)

TOWERS = ("image", "text")
ROLES = ("q", "k", "v", "o", "fc1", "fc2")

# Inside a block of open_clip's own towers.
_LAYERS = {
    "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj",
    "o": "attn.out_proj",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}
_OF_TIMM = {"o": "proj"}
_OF_TRANSFORMERS = {"fc1": "up", "fc2": "down"}


def split_towers(model: _Model, *towers: str) -> _Model:
    """Convert, in place, the blocks' attention so that q, k, v and o are layers that are called.

    `split_attention` on every `nn.MultiheadAttention` in the blocks of the towers: outputs stay the
    same up to rounding, keys of the `state_dict` and parameters stay what they are. A tower without
    one (timm's, transformers', open_clip's custom blocks) is left as it is. Take it back with
    `merge_towers(model)`.

    Args:
        model: a model of open_clip. Split it before patching it.
        *towers: of "image", "text"; both if none is given.

    Returns:
        The same model object.

    Raises:
        TokenGateError: a tower is unknown, or is split already; nothing was changed.
    """
    names = [
        _exactly(f"{block}.attn")
        for tower in towers or TOWERS
        for block, module in _blocks(*_tower("split_towers", model, tower))
        if isinstance(module.attn, nn.MultiheadAttention)
    ]
    return split_attention(model, names) if names else model


def merge_towers(model: _Model) -> _Model:
    """Take back what `split_towers` did, and every other `split_attention`, exactly.

    A model in which nothing is split is left as it is.

    Args:
        model: what was split. Unpatch it first.

    Returns:
        The same model object.

    Raises:
        TokenGateError: a layer that would no longer be called is still patched.
    """
    split = any(isinstance(module, SplitAttention) for module in model.modules())
    return merge_attention(model) if split else model


def clip_targets(model: nn.Module, tower: str, *roles: str) -> list[re.Pattern[str]]:
    """The layers in a tower's blocks that hold the roles asked for, as targets for `patch`.

    Each is a pattern that the full name of one layer matches. The name itself would not do: in a
    `CLIP`, `transformer.resblocks.0.mlp.c_fc` of the text tower is also how a name of the image
    tower ends. Nothing is converted: q, k, v and o of open_clip's own towers are there after
    `split_towers`.
    The projections between the towers, an attentional pool and CoCa's decoder have no role.

    Args:
        model: a model of open_clip (`CLIP`, `CustomTextCLIP`, `CoCa`), the whole of it.
        tower: "image" or "text".
        *roles: of "q", "k", "v", "o", "fc1", "fc2"; the last two are the MLP's, `c_fc` and `c_proj`
            in open_clip's own towers. In a gated MLP both halves are fc1.

    Raises:
        TokenGateError: the tower or a role is unknown; the tower has no such layer, or not yet,
            because it is not split; or the layer is never called.
    """
    check_known(roles, ROLES)
    prefix, module = _tower("clip_targets", model, tower)
    if isinstance(module, TimmModel):
        asked = [_OF_TIMM.get(role, role) for role in roles]
        return [_exactly(f"{prefix}.trunk.{n}") for n in vision.roles(module.trunk, *asked)]
    if isinstance(module, HFTextEncoder):
        inner = module.transformer
        asked = [_OF_TRANSFORMERS.get(role, role) for role in roles]
        names = None
        if "fc1" in roles:
            with contextlib.suppress(TokenGateError):  # most have no gate
                names = language.roles(inner, *asked, "gate")
        names = names or language.roles(inner, *asked)
        return [_exactly(f"{prefix}.transformer.{name}") for name in names]
    found = []
    for block, inside in _blocks(prefix, module):
        for role, layer in _LAYERS.items():
            if role in roles:
                _check_called(inside, layer, tower, role)
                found.append(_exactly(f"{block}.{layer}"))
    if not found:
        raise TokenGateError(
            f"clip_targets was asked for the {tower} tower's {', '.join(roles)}, but that tower is "
            f"a {type(module).__name__} without transformer blocks: name its layers to "
            "tokengate.patch instead, if it has linear ones that are called."
        )
    return found


def _exactly(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name))


def _tower(asked: str, model: nn.Module, tower: str) -> tuple[str, nn.Module]:
    """The name and the module of a tower; the text tower of a `CLIP` is spread over the model."""
    if tower not in TOWERS:
        raise TokenGateError(
            f"{asked} was asked for the tower {brief(tower)}: the towers are image and text."
        )
    for name in ("visual",) if tower == "image" else ("text", "transformer"):
        module = getattr(model, name, None)
        if isinstance(module, nn.Module) and hasattr(model, f"encode_{tower}"):
            return name, module
    raise TokenGateError(
        f"{asked} was asked for the {tower} tower of a {type(model).__name__}, which is no model "
        "of open_clip: pass the whole model, as open_clip.create_model returns it."
    )


def _blocks(prefix: str, tower: nn.Module) -> Iterator[tuple[str, Any]]:
    """The residual blocks of one of open_clip's own towers, by their names in the model."""
    for name in ("transformer.resblocks", "resblocks"):
        blocks: Any = tower
        for part in name.split("."):
            blocks = getattr(blocks, part, None)
        if isinstance(blocks, nn.ModuleList):
            yield from ((f"{prefix}.{name}.{i}", block) for i, block in enumerate(blocks))


def _check_called(block: nn.Module, layer: str, tower: str, role: str) -> None:
    owner_name, _, child = layer.rpartition(".")
    owner = block.get_submodule(owner_name)
    if hasattr(owner, child) and not reads_weight(owner, child):
        return
    whole = isinstance(owner, nn.MultiheadAttention)
    remedy = f'call split_towers(model, "{tower}") first' if whole else "leave it out"
    raise TokenGateError(
        f"the role {role!r} of the {tower} tower is held by a {type(owner).__name__} that calls no "
        f"layer for it, so that nothing could be patched: {remedy}."
    )
