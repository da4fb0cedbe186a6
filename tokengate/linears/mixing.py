"""Layers that mix tokens or heads: their last dimension is no channels, but their positions are."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from tokengate.errors import MixedPositionsWarning, listed
from tokengate.linears.by_name import class_names
from tokengate.names import joined, named_children, named_modules

_SHOWN = 3
_TIME_SERIES = "transformers.models.patchtsmixer.modeling_patchtsmixer."
# In which attributes of an owner they are. By the classes' names, because importing their libraries
# would cost what most users do not use; found by running them.
_MIXING = {
    "timm.models.mlp_mixer.MixerBlock": ("mlp_tokens",),
    "timm.models.mlp_mixer.ResBlock": ("linear_tokens",),
    "timm.models.mlp_mixer.SpatialGatingUnit": ("proj",),
    "timm.models.cait.TalkingHeadAttn": ("proj_l", "proj_w"),
    f"{_TIME_SERIES}PatchMixerBlock": ("mlp", "gating_block"),
    f"{_TIME_SERIES}PatchTSMixerChannelFeatureMixerBlock": ("mlp", "gating_block"),
}


def warn_of_mixing(model: nn.Module, chosen: Collection[nn.Module], stacklevel: int = 4) -> None:
    """Warn, once for all of them, of those of the `chosen` layers that mix tokens or heads.

    By default at the line that called the caller.
    """
    found = [
        joined(name, attribute)
        for name, owner in named_modules(model)
        for attribute, part in named_children(owner)
        if _mixes(owner, attribute) and any(module in chosen for module in part.modules())
    ]
    if found:
        shown = listed(map(repr, found), _SHOWN)
        warnings.warn(
            f"{shown} mix tokens or heads, so that the gates there decide about channels "
            "instead of tokens: exclude them unless that is meant.",
            MixedPositionsWarning,
            stacklevel=stacklevel,
        )


def _mixes(owner: nn.Module, attribute: str) -> bool:
    return any(attribute in _MIXING.get(name, ()) for name in class_names(owner))
