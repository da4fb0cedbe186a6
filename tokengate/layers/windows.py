"""Which part of its sequences a call is about: with a cache, only what comes after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.layers.calls import Window, current_window

_IDS, _EMBEDDED = ("input_ids", "decoder_input_ids"), ("inputs_embeds", "input_embeds")
# transformers 5.24 renamed the first to the second.
_CACHES = ("past_key_values", "cache")
# With one of these a module hands its inputs on to parts, which have windows of their own.
_PARTS = ("decoder_input_ids", "decoder_inputs_embeds")


def window_of(module: nn.Module, names: tuple[str, ...], bound: dict[str, Any]) -> Window | None:
    """That of a forward of `module` that begins, with these parameters `bound` of all `names`."""
    pixels = isinstance(bound.get("pixel_values"), Tensor) and not (set(_IDS) & set(names))
    window = Window(0) if pixels else None
    if window is None and not any(name in names for name in _PARTS):
        window = _window(module, bound)
    # What is inside of a module that received tokens receives the same ones, in other form; and its
    # cache may have grown already.
    if window is not None and (pixels or window.ids is not None or current_window() is None):
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
    mask = bound.get("attention_mask")
    real = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if cache is None:
        return Window(0, length, ids, bool(bound.get("use_cache")), None, real)
    if hasattr(cache, "get_seq_length"):
        return Window(int(cache.get_seq_length()), length, ids, True, cache, real)
    if real is not None:
        return Window(real.shape[1] - length, length, ids, True, cache, real)
    raise TokenGateError(
        f"restrict found {type(module).__name__} called with a {type(cache).__name__}, which does "
        "not tell how many positions it has: pass an attention_mask (B, T) of all positions."
    )
