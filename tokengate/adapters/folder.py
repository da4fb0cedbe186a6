"""Read an adapter's folder, trusting nothing in it."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tokengate.adapters.config import AdapterConfig, from_dict
from tokengate.adapters.weights import MOST_VALUES, Weights, open_weights
from tokengate.errors import TokenGateError, brief
from tokengate.files.regular import open_regular, read_text
from tokengate.files.strict_json import parse

WEIGHTS, CONFIG = "adapter_model.safetensors", "tokengate_config.json"
# What the configuration was called before: PEFT's name, by which other libraries take it for one.
OLD_CONFIG = "adapter_config.json"
# In the weights' metadata: the configuration they were saved with, and the digest of the weights
# whose place they took. In the configuration: the digest of the weights it belongs to.
METADATA, PREVIOUS, SHA256 = "tokengate", "previous", "sha256"

# Of the configuration: in bytes, what safetensors lets the weights know of it.
_MOST_CONFIG = 100_000_000
# How often a folder is read that is written to meanwhile.
_TRIES = 10


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that was read and checked."""

    folder: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    """On the CPU; `load` may make them a model's own."""

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so; found in their order, not by asking all of them."""
        keys, found = self._sorted, {}
        for at in range(bisect_left(keys, prefix), len(keys)):
            if not keys[at].startswith(prefix):
                break
            found[keys[at]] = self.tensors[keys[at]]
        return found

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.tensors)


def read_adapter(folder: str | Path) -> SavedAdapter:
    """The adapter in `folder`, as `save` wrote it.

    What can be named is named: a tensor that is missing, or of another shape or dtype than the
    configuration says, or not finite. Then what was changed otherwise since it was saved is found
    by its digest, so that nothing is of two adapters; where another process saves meanwhile, the
    folder is read again, a few times.

    Raises:
        TokenGateError: the folder or one of its files is missing, damaged or was changed.
    """
    folder = Path(folder)
    for tried in range(1, _TRIES + 1):
        before = _state(folder)
        try:
            return _read(folder)
        except TokenGateError:
            if before == _state(folder) or tried == _TRIES:
                raise
    raise AssertionError


def _state(folder: Path) -> list[tuple[int, ...] | None]:
    """Another one when a file has been replaced, as by a process that saves meanwhile."""
    found: list[tuple[int, ...] | None] = []
    for name in (CONFIG, OLD_CONFIG, WEIGHTS):
        try:
            there = os.stat(folder / name)
            found.append((there.st_ino, there.st_size, there.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def check_no_file(folder: Path) -> None:
    """An error if what was passed as an adapter's folder is one of its files."""
    if folder.is_file():
        raise TokenGateError(
            f"{str(folder)!r} is a file: pass the folder with all of the adapter, "
            f"{str(folder.parent)!r}."
        )


def config_path(folder: Path) -> Path:
    """The configuration of an adapter of ours; under its old name where it has no other."""
    old = folder / OLD_CONFIG
    return old if old.exists() and not (folder / CONFIG).exists() else folder / CONFIG


def _read(folder: Path) -> SavedAdapter:
    check_no_file(folder)
    for path in (folder, config_path(folder), folder / WEIGHTS):
        if not path.exists():
            raise TokenGateError(
                f"{str(path)!r} does not exist: pass a folder that tokengate.save wrote."
            )
    where = str(config_path(folder))
    text = _text(config_path(folder))
    config, belongs_to = _config(text, where)
    with open_weights(folder / WEIGHTS) as weights:
        own = weights.metadata.get(METADATA, "")
        if interrupted := bool(belongs_to) and weights.metadata.get(PREVIOUS) == belongs_to:
            # `save` was killed after it had put the weights in place: they are whole, and newer.
            config, _ = _config(own, f"the metadata of {str(folder / WEIGHTS)!r}")
        _check_tensors(weights, config)
        tensors, actual = weights.values()
    if not interrupted:
        if belongs_to != actual:
            raise TokenGateError(
                f"{str(folder / WEIGHTS)!r} is not what {where} was saved with: one of them was "
                "changed or copied alone, so save the adapter again."
            )
        _check_same(text, own, actual, folder)
    return SavedAdapter(folder, config, tensors)


def _config(text: str, where: str) -> tuple[AdapterConfig, Any]:
    """What `text` says, and the digest of the weights that it belongs to."""
    found = parse(text, where, values=MOST_VALUES)
    belongs_to = found.pop(SHA256, None)
    return from_dict(found, where), belongs_to


def read_config(path: Path) -> dict[str, Any]:
    """The object in a configuration, of whatever format."""
    return parse(_text(path), str(path), values=MOST_VALUES)


def with_digest(own: str, digest: str) -> str:
    """The text of the configuration that belongs to weights which know it as `own`."""
    return own.removesuffix("\n}") + f',\n "{SHA256}": "{digest}"\n}}'


def _text(path: Path) -> str:
    try:
        return read_text(path, _MOST_CONFIG)
    except (OSError, UnicodeDecodeError, MemoryError) as error:
        raise TokenGateError(
            f"{path} could not be read ({brief(str(error))}): save the adapter again."
        ) from None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def own_config(path: Path) -> tuple[str, str]:
    """What weights that `save` wrote know as their configuration, as JSON, and their digest.

    Both of one file, though another process may put its own there meanwhile.
    """
    with open_weights(path) as weights:
        return weights.metadata.get(METADATA, ""), weights.digest()


def _check_tensors(weights: Weights, config: AdapterConfig) -> None:
    path, present = weights.path, weights.tensors
    for key, wanted in config.tensors.items():
        if key not in present:
            raise TokenGateError(
                f"{str(path)!r} lacks {key!r} of shape {wanted.shape}: save the adapter again."
            )
        found = present[key]
        if found.shape != wanted.shape:
            raise TokenGateError(
                f"{str(path)!r} has {key!r} of shape {found.shape}, which was saved as "
                f"{wanted.shape}: save the adapter again."
            )
        if found.dtype != wanted.dtype:
            raise TokenGateError(
                f"{str(path)!r} has {key!r} of shape {found.shape} as {found.dtype}, which was "
                f"saved as {wanted.dtype}: save the adapter again."
            )
    for key, found in present.items():
        if key not in config.tensors:
            raise TokenGateError(
                f"{str(path)!r} has {key!r} of shape {found.shape}, which was not saved with it: "
                "save the adapter again."
            )


def _check_same(text: str, own: str, digest: str, folder: Path) -> None:
    """An error if the configuration is not what the weights were saved with."""
    if text == with_digest(own, digest):  # as `save` wrote it
        return
    where = str(config_path(folder))
    found = parse(text, where, values=MOST_VALUES)
    saved = parse(own, str(folder / WEIGHTS), values=MOST_VALUES) | {SHA256: digest}
    for key in sorted(found.keys() | saved.keys()):
        if found.get(key) != saved.get(key):
            raise TokenGateError(
                f"{where} was changed in {key!r} since it was saved: load the adapter as it is, "
                "change the model, and save it again."
            )
