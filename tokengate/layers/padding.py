"""Padding: an attention mask, on its way from the module that receives it to the gates inside.

A position whose mask is 0 counts neither in tau's gradient nor in sparsity; no output changes.
The mask belongs to the module that received it: to the patched layers inside of that module, for as
long as its forward runs in this thread, and nowhere else. Some layers have the positions first and
the samples second, `(T, B, C)`: where there are as many of both, no shape tells a mask from its
transpose, so they are marked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokengate.layers.calls import Running, begin, contexts, end
from tokengate.layers.gated_linear import Gated
from tokengate.layers.windows import window_of
from tokengate.linears.by_name import class_names

_FOLLOWED = "_tokengate_padding"
# The parameters of forward that say what the positions of a module are.
_MASK = "attention_mask"
_INPUTS = ("input_ids", "inputs_embeds", "input_embeds")
_STATES = (*_INPUTS, "hidden_states")
# transformers 5.24 renamed the first to the second.
_CACHES = ("past_key_values", "cache")
# With one of these, a module hands its mask on to one of several parts: only that part, which
# receives it in its turn, has the mask's positions.
_SEVERAL_PARTS = ("pixel_values", "decoder_input_ids", "decoder_attention_mask")
_OTHER_STATES = ("key_value_states", "encoder_hidden_states")
# torch's own name it otherwise, and say True where there is padding.
_TORCH = {
    nn.TransformerEncoder: "src_key_padding_mask",
    nn.TransformerEncoderLayer: "src_key_padding_mask",
    nn.TransformerDecoder: "tgt_key_padding_mask",
    nn.TransformerDecoderLayer: "tgt_key_padding_mask",
}

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


@dataclass
class _Followed:
    """What is kept on a module while it is followed."""

    parameters: tuple[str, ...]  # the names of its forward's
    inverted: str | None  # the one of these that is True where there is padding
    hooks: tuple[RemovableHandle, ...]
    inside: frozenset[nn.Module]  # the patched layers in it


def follow_masks(model: nn.Module) -> None:
    """Let attention masks reach the gates in `model`, wherever its forwards are entered."""
    _mark_sequence_first(model)
    for module in _holders(model):
        if _FOLLOWED not in module.__dict__:
            hooks = (
                module.register_forward_pre_hook(_enter, with_kwargs=True),
                module.register_forward_hook(_leave, with_kwargs=True, always_call=True),
            )
            inverted = next((n for kind, n in _TORCH.items() if isinstance(module, kind)), None)
            module.__dict__[_FOLLOWED] = _Followed(
                _parameters(type(module)), inverted, hooks, frozenset()
            )
        module.__dict__[_FOLLOWED].inside = frozenset(_patched(module))


def unfollow_masks(model: nn.Module) -> None:
    """Take back what `follow_masks` did, from modules that hold no patched layer any more."""
    holders = set(_holders(model))
    for module in model.modules():
        if _FOLLOWED in module.__dict__ and module not in holders:
            for hook in module.__dict__.pop(_FOLLOWED).hooks:
                hook.remove()


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules around the patched layers."""
    return [
        module
        for module in model.modules()
        if not isinstance(module, Gated) and next(_patched(module), None) is not None
    ]


def _patched(module: nn.Module) -> Iterator[Gated]:
    return (m for m in module.modules() if isinstance(m, Gated))


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    followed: _Followed = module.__dict__[_FOLLOWED]
    bound = {**dict(zip(followed.parameters, args, strict=False)), **kwargs}
    if isinstance(module, nn.MultiheadAttention):
        begin(_attention(module, followed, bound))
        return
    call = _running(module, followed, args, bound)
    # Compiled code cannot set what it finds out; a mask that then wants it fits no call.
    if any(c.windows for c in contexts()) and not torch.compiler.is_dynamo_compiling():
        call.window = window_of(module, followed.parameters, bound)
    begin(call)


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    end(module)


def _attention(
    module: nn.MultiheadAttention, followed: _Followed, bound: dict[str, Any]
) -> Running:
    """Its mask is of its keys, which are its queries or not; it tells its own layers apart."""
    mask = _real(bound.get("key_padding_mask"))
    if bound.get("query") is bound.get("key"):
        return Running(module, followed.inside, True, mask is not None, mask)
    of_keys = {module._modules.get("k_proj"), module._modules.get("v_proj")}
    return Running(module, followed.inside & of_keys, True, True, mask)


def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(kind.forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def _running(
    module: nn.Module, followed: _Followed, args: tuple[Any, ...], bound: dict[str, Any]
) -> Running:
    names = followed.parameters
    states = [bound[name] for name in _STATES if isinstance(bound.get(name), Tensor)]
    tensors = states or [value for value in args if isinstance(value, Tensor)]
    first = tensors[0] if tensors else None
    mask, inferred = None, False
    if not any(name in names for name in _SEVERAL_PARTS):
        mask = _padding(bound.get(_MASK))
        # To the layers of Longformer and LED it is what is added to the scores: 0 where it is real.
        if mask is not None and mask.is_floating_point() and not any(n in names for n in _INPUTS):
            mask = None
        if mask is None and first is not None and any(bound.get(n) is first for n in _INPUTS):
            mask, inferred = _attending(bound.get(_MASK), first), True
    if followed.inverted is not None:
        mask = _real(bound.get(followed.inverted))
    cached = any(bound.get(name) is not None for name in _CACHES)
    if mask is not None and cached and first is not None and first.dim() > 1:
        mask = mask[:, -first.shape[1] :]  # the cache has the positions before
    pixels = first is not None and first.dim() == 4 and first.is_floating_point()
    if isinstance(bound.get("target_mapping"), Tensor):  # XLNet's layers see its targets, too
        mask, pixels = None, True
    others = next((bound[n] for n in _OTHER_STATES if isinstance(bound.get(n), Tensor)), None)
    return Running(
        module,
        followed.inside,
        tells=mask is not None or pixels,
        mask=mask,
        inferred=inferred,
        others=others,
        others_mask=_padding(bound.get("encoder_attention_mask")),
        decodes=others is not None or bound.get("encoder_outputs") is not None,
    )


def _padding(mask: Any) -> Tensor | None:
    # With more dimensions it says who attends to whom.
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _real(mask: Any) -> Tensor | None:
    """`(B, T)` of torch's `key_padding_mask`: True, or -inf, where there is padding."""
    padding = _padding(mask)
    if padding is None or not padding.is_floating_point():
        return None if padding is None else padding == 0
    return padding > torch.finfo(padding.dtype).min / 2


def _attending(mask: Any, first: Tensor) -> Tensor | None:
    """`(B, T)` of a mask `(B or 1, H, T, K)` with which a model of inputs `(B, T, ...)` is called.

    A position that attends to nothing is padding, as on the left of what `generate` gives a model
    with a static cache. Padding on the right attends to what is before it, and cannot be told.
    """
    if isinstance(mask, dict) and mask:  # one for each kind of layer: each attends to itself
        mask = next(iter(mask.values()))
    if not (isinstance(mask, Tensor) and mask.dim() == 4 and first.dim() > 1):
        return None
    # One for all samples, or one for each. Whether others fit is for the model to say.
    if mask.shape[0] not in (1, first.shape[0]) or mask.shape[2] != first.shape[1]:
        return None
    if mask.is_floating_point():  # added to the scores; a bias may be negative, too
        mask = mask > torch.finfo(mask.dtype).min / 2
    real: Tensor = (mask != 0).any(3).any(1)
    return real.expand(len(first), -1)


def _mark_sequence_first(model: nn.Module) -> None:
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
