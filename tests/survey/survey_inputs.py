"""What a model of transformers is called with, guessed by the names of what it takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_BATCH, _LENGTH = 2, 9


def generic_inputs(model: nn.Module, config: Any) -> list[dict[str, Any]]:
    """Keyword arguments with which the model's forward may be called, in the order of trying.

    All that is known by name, for models of several modalities; or what it says is its main one,
    beside what has no default.
    """
    parameters = inspect.signature(type(model).forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    needed = [main, *(n for n, p in parameters.items() if p.default is inspect.Parameter.empty)]
    known = [name for name in _MAKERS if name in parameters and name not in _INSTEAD]
    some = [name for name in ("input_ids", "pixel_values", "bbox") if name in parameters]
    ways = [needed, [*needed, *some], [*needed, *known]]
    made = [_made(config, parameters, way) for way in ways]
    return [each for i, each in enumerate(made) if each.keys() not in [m.keys() for m in made[:i]]]


def _made(config: Any, parameters: Any, wanted: list[str]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {}
    for name in wanted:
        make = _MAKERS.get(name)
        if make is not None and name in parameters:
            found.setdefault(name, make(config, generator))
    for grid in _GRIDS & parameters.keys():  # of packed patches
        side = _said(config, "patch_size", default=14)
        size = 3 * side * side * _said(config, "temporal_patch_size", default=1)
        if main := {"hidden_states", "pixel_values"} & found.keys():
            found[min(main)] = torch.randn(16, size, generator=generator)
            found[grid] = torch.tensor([[1, 4, 4]])
    text = any(name in found for name in ("input_ids", "inputs_embeds"))
    if text and "attention_mask" in parameters:
        found["attention_mask"] = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    decodes = getattr(config, "is_encoder_decoder", False) or not text
    if "decoder_input_ids" in parameters and decodes:
        found["decoder_input_ids"] = _ids(config, generator)
    if "return_dict" in parameters:
        found["return_dict"] = True
    return found


def _said(config: Any, *names: str, default: int) -> Any:
    """The first of these that the configuration has, in itself or in one of its parts."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (int, list, tuple)) and value:
            return value
    for part in getattr(type(config), "sub_configs", {}):
        inner = getattr(config, part, None)
        if inner is not None and inner is not config:
            value = _said(inner, *names, default=0)
            if value:
                return value
    return default


def _ids(config: Any, generator: torch.Generator) -> Tensor:
    top = _said(config, "vocab_size", default=100)
    return torch.randint(5, max(6, min(top, 100)), (_BATCH, _LENGTH), generator=generator)


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    size = _said(config, "image_size", "input_size", default=64)
    height, width = (size[0], size[-1]) if isinstance(size, (list, tuple)) else (size, size)
    channels = _said(config, "num_channels", "in_channels", "in_chans", default=3)
    shape = [_BATCH, channels, height, width]
    frames = getattr(config, "num_frames", None)
    if isinstance(frames, int):
        shape.insert(1, frames)
    return torch.randn(shape, generator=generator)


def _video(config: Any, generator: torch.Generator) -> Tensor:
    size = _said(config, "image_size", "crop_size", default=64)
    frames = _said(config, "num_frames", "frames_per_clip", default=4)
    return torch.randn(1, frames, 3, size, size, generator=generator)


def _features(config: Any, generator: torch.Generator) -> Tensor:
    """Of a spectrogram: `(B, bins, T)` as Whisper has them, `(B, T, bins)` as others do."""
    source = getattr(config, "max_source_positions", None)
    bins = _said(config, "num_mel_bins", "input_feat_per_channel", "feature_size", default=80)
    if isinstance(source, int) and hasattr(config, "num_mel_bins"):
        return torch.randn(1, bins, 2 * source, generator=generator)
    return torch.randn(_BATCH, 64, bins, generator=generator)


def _values(config: Any, generator: torch.Generator) -> Tensor:
    """A wave, or the spectrogram of a transformer of these; with channels where they are asked."""
    if hasattr(config, "codebook_size") or hasattr(config, "audio_channels"):
        return torch.randn(_BATCH, 1, 4000, generator=generator)
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if isinstance(bins, int) and isinstance(length, int) and hasattr(config, "patch_size"):
        return torch.randn(_BATCH, length, bins, generator=generator)
    return torch.randn(_BATCH, 4000, generator=generator)


_GRIDS = {"grid_thw", "image_grid_thw"}
# What takes the place of input_ids.
_INSTEAD = ("hidden_states", "inputs_embeds")
_MAKERS = {
    "input_ids": _ids,
    "bbox": lambda c, g: torch.zeros(_BATCH, _LENGTH, 4, dtype=torch.long),
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "input_features": _features,
    "input_values": _values,
    "hidden_states": lambda c, g: torch.randn(
        _BATCH, _LENGTH, _said(c, "hidden_size", "d_model", default=32), generator=g
    ),
    "inputs_embeds": lambda c, g: torch.randn(
        _BATCH, _LENGTH, _said(c, "hidden_size", "d_model", default=32), generator=g
    ),
}
