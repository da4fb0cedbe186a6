"""What a forward is called with, as far as that says which positions it is about.

A position whose mask is 0 counts neither in tau's gradient nor in sparsity; no output changes.
The mask belongs to the module that received it: to the patched layers inside of that module, for as
long as its forward runs in this thread, and nowhere else. Some layers have the positions first and
the samples second, `(T, B, C)`: where there are as many of both, no shape tells a mask from its
transpose, so they are marked.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.layers.calls import Running, Window, contexts, left_on, running, same, window_around
from tokengate.layers.regions import length_of

# The parameters of forward that say what the positions of a module are.
_MASK = "attention_mask"
_IDS, _EMBEDDED = ("input_ids", "decoder_input_ids"), ("inputs_embeds", "input_embeds")
_INPUTS = ("input_ids", *_EMBEDDED)
_STATES = (*_INPUTS, "hidden_states")
# transformers 5.24 renamed the others to the second.
_CACHES = ("past_key_values", "cache", "cache_params")
# With one of these, a module hands its mask on to one of several parts: only that part, which
# receives it in its turn, has the mask's positions.
_SEVERAL_PARTS = ("pixel_values", "decoder_input_ids", "decoder_attention_mask")
# The same of its inputs: its parts have windows of their own.
_PARTS = ("decoder_input_ids", "decoder_inputs_embeds")
# What a module is given beside its own states, and the masks of that, under whichever name.
_OTHERS = {
    "key_value_states": (),
    "encoder_hidden_states": (
        "encoder_attention_mask",
        "encoder_hidden_states_mask",
        "encoder_mask",
        "source_attention_mask",
        "text_embedding_mask",
    ),
    "encoder_hidden_states_2": ("encoder_attention_mask_2",),
    "encoder_hidden_states_t5": ("text_embedding_mask_t5",),
    "audio_encoder_hidden_states": ("audio_encoder_attention_mask",),
    "context": ("context_mask",),
    "prompt_embeds": ("prompt_embeds_mask", "prompt_attention_mask"),
}
# What is added to a score where there is padding is below, in any dtype; a bias is not.
_PADDED = -1e3
# torch's own name it otherwise, and say True where there is padding.
_TORCH = {
    nn.TransformerEncoder: "src_key_padding_mask",
    nn.TransformerEncoderLayer: "src_key_padding_mask",
    nn.TransformerDecoder: "tgt_key_padding_mask",
    nn.TransformerDecoderLayer: "tgt_key_padding_mask",
}


@dataclass(frozen=True)
class Signature:
    """What is known of a module's forward before it is called.

    Attributes:
        names: of its parameters.
        inverted: the one of these that is True where there is padding, or None.
    """

    names: tuple[str, ...]
    inverted: str | None


def signature_of(module: nn.Module) -> Signature:
    """That of a module's forward."""
    try:
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    except (TypeError, ValueError):
        names = ()
    inverted = next((name for kind, name in _TORCH.items() if isinstance(module, kind)), None)
    return Signature(names, inverted)


def what_is_said(
    module: nn.Module,
    inside: Collection[nn.Module],
    signature: Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Running:
    """What a forward of `module`, which begins, tells the patched layers that are `inside`."""
    bound = {**dict(zip(signature.names, args, strict=False)), **kwargs}
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, inside, bound)
    call = _running(module, inside, signature, args, bound)
    # Compiled code cannot set what it finds out; a mask that then wants it fits no call.
    if any(c.windows for c in contexts()) and not torch.compiler.is_dynamo_compiling():
        call.window = _window_of(module, signature.names, bound) or call.window
    return call


def _attention(
    module: nn.MultiheadAttention, inside: Collection[nn.Module], bound: dict[str, Any]
) -> Running:
    """Its mask is of its keys, which are its queries or not; it tells its own layers apart."""
    mask = _real(bound.get("key_padding_mask"))
    if bound.get("query") is bound.get("key"):
        return Running(module, inside, True, mask is not None, mask)
    of_keys = {module._modules.get("k_proj"), module._modules.get("v_proj")}
    return Running(module, frozenset(inside) & of_keys, True, True, mask)


def _running(
    module: nn.Module,
    inside: Collection[nn.Module],
    signature: Signature,
    args: tuple[Any, ...],
    bound: dict[str, Any],
) -> Running:
    names = signature.names
    states = [bound[name] for name in _STATES if isinstance(bound.get(name), Tensor)]
    tensors = states or [each for each in (*args, *bound.values()) if isinstance(each, Tensor)]
    first = tensors[0] if tensors else None
    length = None if first is None else _length(first)
    others, of_others = _others(names, bound, first)
    mask, inferred = None, False
    if not of_others and not any(name in names for name in _SEVERAL_PARTS):
        mask = _padding(bound.get(_MASK))
        # To the layers of Longformer and LED it is what is added to the scores: 0 where it is real.
        if mask is not None and mask.is_floating_point() and not any(n in names for n in _INPUTS):
            mask = None
        if mask is None and first is not None:
            mask, inferred = _guessed(bound, first, [each.shape[1] for each, _ in others]), True
    if signature.inverted is not None:
        mask = _real(bound.get(signature.inverted))
    cached = any(bound.get(name) is not None for name in _CACHES)
    if mask is not None and cached and first is not None and first.dim() > 1:
        mask = mask[:, -first.shape[1] :]  # the cache has the positions before
    window = None
    if mask is None and first is not None:
        mask, window = _known(first)
        inferred = inferred and mask is None
    pixels = first is not None and first.dim() == 4 and first.is_floating_point()
    if isinstance(bound.get("target_mapping"), Tensor):  # XLNet's layers see its targets, too
        mask, pixels = None, True
    return Running(
        module,
        inside,
        tells=mask is not None or pixels,
        mask=mask,
        inferred=inferred,
        length=length,
        others=others,
        decodes=bool(others) or bound.get("encoder_outputs") is not None,
        window=window,
    )


def _length(first: Tensor) -> int | None:
    """How many positions there are in ids `(B, T)` or states `(B, T, C)`."""
    sequences = first.dim() == (3 if first.is_floating_point() else 2)
    return first.shape[1] if sequences and not first.is_nested else None


def _known(first: Tensor) -> tuple[Tensor | None, Window | None]:
    """The mask of what a module is called with, as the modules around it, or before it, know it."""
    for call in running():
        for states, mask in call.others:
            if same(first, states):
                return mask, None
    left = left_on(first)
    return (None, None) if left is None else (left.mask, left.window)


def _others(
    names: tuple[str, ...], bound: dict[str, Any], first: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor | None]], bool]:
    """What a module is given beside its own, with masks; whether `attention_mask` is theirs."""
    found, is_theirs = [], False
    for name, masks in _OTHERS.items():
        states = bound.get(name)
        if not isinstance(states, Tensor) or states is first:  # which attends to itself
            continue
        mask = next((m for n in masks if (m := _of(states, bound.get(n))) is not None), None)
        if mask is None and not any(n in names for n in masks):
            mask = _of(states, bound.get(_MASK))
            # Where both are as many, it is of its own, unless it was made a bias of keys.
            if mask is bound.get(_MASK) and first is not None and states.shape[1] == _length(first):
                mask = None
            is_theirs = is_theirs or mask is not None
            if mask is None and first is not None:
                mask = _first_part(states, bound.get(_MASK), _length(first))
        found.append((states, _of_outer(states) if mask is None else mask))
    return found, is_theirs


def _first_part(states: Tensor, mask: Any, length: int | None) -> Tensor | None:
    """That of `states` in a mask of them and of `length` positions after them, `(B, L + T)`."""
    if length is None or not isinstance(mask, Tensor) or states.dim() < 2:
        return None
    joined = (len(states), states.shape[1] + length)
    return mask[:, : states.shape[1]] if mask.shape == joined else None


def _of_outer(states: Tensor) -> Tensor | None:
    """The mask of what a module around was given, and has projected or joined for this one."""
    for call in reversed(running()):
        for others, mask in call.others:
            if same(states, others) or (mask is not None and mask.shape == states.shape[:2]):
                return mask
        masks = [mask for _, mask in call.others if mask is not None]
        if len(masks) == len(call.others) > 1:
            joined = torch.cat([mask != 0 for mask in masks], 1)
            if joined.shape == states.shape[:2]:
                return joined
    return None


def _of(states: Tensor, mask: Any) -> Tensor | None:
    """A mask of `states` `(B, L, ...)` as `(B, L)`, also where it is one of keys, or a bias."""
    if not isinstance(mask, Tensor) or states.dim() < 2:
        return None
    keys = _of_keys(mask)
    return keys if keys is not None and keys.shape == states.shape[:2] else None


def _of_keys(mask: Tensor) -> Tensor | None:
    """`(B, T)` of `(B, T)`, `(B, 1, T)` or `(B, 1, 1, T)`: the same for whoever attends."""
    if mask.dim() == 2:
        return mask
    if mask.dim() not in (3, 4) or any(size != 1 for size in mask.shape[1:-1]):
        return None
    keys = mask.flatten(1)
    return keys > _PADDED if keys.is_floating_point() else keys != 0


def _guessed(bound: dict[str, Any], first: Tensor, beside: list[int]) -> Tensor | None:
    """`(B, T)` of a mask of more dimensions of a module's own states, or of all it has joined."""
    mask = bound.get(_MASK)
    found = None
    if any(bound.get(name) is first for name in _INPUTS):
        found = _attending(mask, first)
    length = _length(first)
    if found is None and isinstance(mask, Tensor) and mask.dim() > 2 and length is not None:
        keys = _of_keys(mask)
        if keys is not None and keys.shape[1] in (length, length + sum(beside)):
            return keys if len(keys) == len(first) else None
    return found


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


def _window_of(module: nn.Module, names: tuple[str, ...], bound: dict[str, Any]) -> Window | None:
    """Which part of its sequences a call is about: with a cache, only what comes after it."""
    pixels = isinstance(bound.get("pixel_values"), Tensor) and not (set(_IDS) & set(names))
    window = Window(0) if pixels else None
    if window is None and not any(name in names for name in _PARTS):
        window = _window(module, bound)
    # What is inside of a module that received tokens receives the same ones, in other form; and its
    # cache may have grown already.
    if window is not None and (pixels or window.ids is not None or window_around() is None):
        return window
    return None


def _window(module: nn.Module, bound: dict[str, Any]) -> Window | None:
    ids = next((bound[n] for n in _IDS if isinstance(bound.get(n), Tensor)), None)
    embedded = next((bound[n] for n in _EMBEDDED if isinstance(bound.get(n), Tensor)), None)
    states = ids if ids is not None else embedded
    if states is None or states.dim() < 2:
        return None
    length = states.shape[1]
    cache = next((bound[n] for n in _CACHES if bound.get(n) is not None), None)
    real = _padding(bound.get(_MASK))
    if cache is None:
        return Window(0, length, ids, bool(bound.get("use_cache")), None, real)
    start = length_of(cache, length)
    if start is None and real is not None:
        start = real.shape[1] - length
    if start is not None:
        return Window(start, length, ids, True, cache, real)
    raise TokenGateError(
        f"restrict found {type(module).__name__} called with a {type(cache).__name__}, which does "
        "not tell how many positions it has: compute them within this context, or pass an "
        "attention_mask (B, T) of all of them."
    )
