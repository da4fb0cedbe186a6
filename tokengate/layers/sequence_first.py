"""Layers whose input has the positions first and the samples second, `(T, B, C)`.

Where there are as many samples as positions, no shape tells a mask from its transpose.
"""

from __future__ import annotations

from torch import nn

from tokengate.layers.gated_linear import Gated
from tokengate.linears.by_name import class_names

# Modules of transformers that call all layers inside of them so; found by running them.
_TRANSPOSING = tuple(
    f"transformers.models.{name}"
    for name in (
        "xlnet.modeling_xlnet.XLNetModel",
        "fsmt.modeling_fsmt.EncoderLayer",
        "fsmt.modeling_fsmt.DecoderLayer",
        "longformer.modeling_longformer.LongformerSelfAttention",
        "led.modeling_led.LEDEncoderSelfAttention",
    )
)


def mark_sequence_first(model: nn.Module) -> None:
    """Tell the patched layers in `model` that are sequence-first."""
    for owner in model.modules():
        # With those inside of it: the patched slices of a fused layer.
        for layer in (inside for module in _sequence_first(owner) for inside in module.modules()):
            if isinstance(layer, Gated):
                layer._sequence_first = True


def _sequence_first(owner: nn.Module) -> list[nn.Module]:
    if isinstance(owner, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        # Not those of its attention, which sees to it itself.
        return [] if owner.self_attn.batch_first else [owner.linear1, owner.linear2]
    return [owner] if any(name in _TRANSPOSING for name in class_names(owner)) else []
