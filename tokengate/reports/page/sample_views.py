"""What a report shows of one sample: a text's tokens or an image's patches, with the S of each."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokengate.errors import TokenGateError, brief
from tokengate.reports.call_store import content_of, packed
from tokengate.reports.page.words import numbered, words_of
from tokengate.reports.tables.sparsity_table import value

_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class TokenView:
    """One text for `SparsityReport.to_html`:

        with tokengate.record(model, positions=True) as rec:
            model(**batch)
        sample = rec.sample(0)
        tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
        view = tokengate.TokenView(tokens, sample.is_open, sample.real)

    Raises:
        TokenGateError: there are no tokens or no modules, or something is not of as many positions.
    """

    tokens: Sequence[str]
    """T tokens as they are to be read, from `convert_ids_to_tokens` or decoded one by one."""
    is_open: Mapping[str, Tensor]
    """S by module, boolean tensors of shape (T,)."""
    real: Tensor | None = None
    """Which positions are no padding, a boolean tensor of shape (T,); None for all of them."""
    title: str = ""
    """What stands above it; by default its number."""
    ratios: Mapping[str, Tensor] | None = None
    """r by module (eq. 4), (T,): `sample.ratios` of `record(positions=True, ratios=True)`."""
    log_prob: Tensor | None = None
    """The change of each token's log-probability, (T,), as `tokengate.compare` finds it; NaN where
    there is none."""
    kl: Tensor | None = None
    """The KL of each token's distribution from the base's, (T,), likewise."""
    words: Sequence[int] | None = None
    """Of each token the number of its word, ascending; None to see it by the marks of tokenizers.
    `tokenizer(...).word_ids()` has None at special tokens, which are words of their own."""

    def __post_init__(self) -> None:
        # One string is a sequence of strings, too: its characters.
        listed = isinstance(self.tokens, Sequence) and not isinstance(self.tokens, str)
        if not listed or not all(isinstance(token, str) for token in self.tokens):
            raise TokenGateError(
                f"tokens={brief(self.tokens)} is not a list of strings: pass "
                "tokenizer.convert_ids_to_tokens(ids)."
            )
        _check_there(self.is_open)
        for name, tensor in self.is_open.items():
            _check_length(f"is_open[{name!r}]", tensor, len(self.tokens))
        if self.real is not None:
            _check_length("real", self.real, len(self.tokens))
        numbers: dict[str, Any] = {f"ratios[{n!r}]": r for n, r in (self.ratios or {}).items()}
        for name, given in {**numbers, "log_prob": self.log_prob, "kl": self.kl}.items():
            if given is not None:
                _check_numbers(name, given, len(self.tokens))
        if self.words is not None and len(self.words) != len(self.tokens):
            raise TokenGateError(
                f"words has {len(self.words)} numbers for {len(self.tokens)} tokens: pass one for "
                "each token, or None."
            )

    def data(self, numbers: Mapping[str, int]) -> dict[str, Any]:
        """For the page's JSON; `numbers` are those of the report's modules, by name."""
        real = torch.ones(len(self.tokens), dtype=torch.bool) if self.real is None else self.real
        return {
            "tokens": list(self.tokens),
            **_positions(self.is_open, real, numbers),
            "title": self.title,
            "ratios": self._levels(),
            "log_prob": _rounded(self.log_prob),
            "kl": _rounded(self.kl),
            "words": numbered(words_of(self.tokens) if self.words is None else self.words),
        }

    def _levels(self) -> str | None:
        """r in the order of `is_open`, a byte each: see `_level`; NaN where it is not known."""
        if not self.ratios:
            return None
        unknown = torch.full((len(self.tokens),), torch.nan)
        rows = [_level(self.ratios.get(name, unknown)) for name in self.is_open]
        return _in_base64(torch.cat(rows))


@dataclass(frozen=True)
class PatchView:
    """One image for `SparsityReport.to_html`:

        with tokengate.record(model, positions=True) as rec:
            model(images)
        is_open = {name: patch_grid(model, s[0], name)[0] for name, s in rec.positions.items()}
        view = tokengate.PatchView("cat.png", is_open)

    Where a model merges patches from stage to stage, as a Swin does, the picture has the finest
    grid, and a patch that was merged shades all that it came from.

    Raises:
        TokenGateError: the image is neither PNG nor JPEG, there are no modules, or a grid does not
            divide the finest.
        OSError: the image cannot be read.
    """

    image: bytes | str | os.PathLike[str]
    """A PNG or JPEG of what the model saw: the file's content, or its path."""
    is_open: Mapping[str, Tensor]
    """S by module, boolean tensors of shape (rows, columns), which may differ by module."""
    title: str = ""
    """What stands above it; by default its number."""

    def __post_init__(self) -> None:
        _kind(_content(self.image))
        _check_there(self.is_open)
        for name, tensor in self.is_open.items():
            _check_boolean(f"is_open[{name!r}]", tensor, "(rows, columns)")
            if tensor.dim() != 2 or not tensor.numel():
                raise TokenGateError(
                    f"is_open[{name!r}] has shape {tuple(tensor.shape)}, not (rows, columns): "
                    "arrange the positions as the patches are in the image, e.g. with patch_grid "
                    "of tokengate.integrations.vision."
                )
        for name, tensor in self.is_open.items():
            if any(fine % own for fine, own in zip(self._grid(), tensor.shape, strict=True)):
                raise TokenGateError(
                    f"is_open[{name!r}] has a grid of {tuple(tensor.shape)}, which does not divide "
                    f"the finest one, {self._grid()}: pass the modules of each grid in a view of "
                    "their own."
                )

    def _grid(self) -> tuple[int, int]:
        """The rows and columns of the finest grid."""
        rows, columns = zip(*(tensor.shape for tensor in self.is_open.values()), strict=True)
        return max(rows), max(columns)

    def data(self, numbers: Mapping[str, int]) -> dict[str, Any]:
        """For the page's JSON; `numbers` are those of the report's modules, by name."""
        content = _content(self.image)
        rows, columns = self._grid()
        flat = {
            name: is_open.repeat_interleave(rows // is_open.shape[0], 0)
            .repeat_interleave(columns // is_open.shape[1], 1)
            .flatten()
            for name, is_open in self.is_open.items()
        }
        return {
            "source": f"data:{_kind(content)};base64,{base64.b64encode(content).decode()}",
            "rows": rows,
            "columns": columns,
            **_positions(flat, torch.ones(rows * columns, dtype=torch.bool), numbers),
            "title": self.title,
        }


def _check_there(is_open: Mapping[str, Tensor]) -> None:
    if not isinstance(is_open, Mapping) or not is_open:
        raise TokenGateError(
            f"is_open={brief(is_open)} has no module to show: pass S by module, as "
            "tokengate.record(model, positions=True) records it."
        )


def _check_boolean(name: str, tensor: Any, shape: str) -> None:
    if not (isinstance(tensor, Tensor) and tensor.dtype == torch.bool):
        raise TokenGateError(
            f"{name}={brief(tensor)} is not a boolean tensor: pass one of shape {shape}."
        )


def _check_length(name: str, tensor: Any, length: int) -> None:
    _check_boolean(name, tensor, f"({length},)")
    if tuple(tensor.shape) != (length,) or not length:
        raise TokenGateError(
            f"{name} has shape {tuple(tensor.shape)}, but ({length},) is wanted, one for each "
            "token, and at least one: pass modules that saw these positions."
        )


def _check_numbers(name: str, tensor: Any, length: int) -> None:
    if not (isinstance(tensor, Tensor) and tensor.is_floating_point()) or tensor.shape != (length,):
        shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
        raise TokenGateError(
            f"{name}{shape} is no floating-point tensor of shape ({length},): pass one number for "
            "each token."
        )


def _rounded(numbers: Tensor | None) -> list[float | None] | None:
    """To four digits, of which more would make the page large; None where there is none."""
    if numbers is None:
        return None
    return [value(float(f"{each:.4g}")) for each in numbers.double().tolist()]


def _level(ratios: Tensor) -> Tensor:
    """r in a byte: 1 + 8 (log2 r + 22) for r from 2^-22 to 2^9, 1 below, 254 above; 0 for NaN."""
    steps = (8 * (ratios.cpu().double().log2() + 22)).nan_to_num(torch.nan, 1e3, -1e3)
    return torch.where(steps.isnan(), 0, 1 + steps.nan_to_num(0).round().clamp(0, 253)).byte()


def _content(image: bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise TokenGateError(
            f"image= was given a {type(image).__name__}: save the picture as PNG or JPEG, as "
            "torchvision.utils.save_image or PIL does, and pass its path or its bytes."
        )
    return Path(image).read_bytes()


def _kind(content: bytes) -> str:
    for start, kind in _KINDS.items():
        if content.startswith(start):
            return kind
    raise TokenGateError(
        f"image={brief(content[:8])}... is neither a PNG nor a JPEG: save the picture as one of "
        "them and pass its path or its bytes."
    )


def _positions(
    is_open: Mapping[str, Tensor], real: Tensor, numbers: Mapping[str, int]
) -> dict[str, Any]:
    stacked = torch.stack([tensor.cpu() for tensor in is_open.values()])
    return {
        "length": len(real),
        "modules": [numbers[name] for name in is_open],
        "open": _in_base64(packed(stacked)),
        "real": _in_base64(packed(real.cpu())),
    }


def _in_base64(octets: Tensor) -> str:
    return base64.b64encode(content_of(octets)).decode()
