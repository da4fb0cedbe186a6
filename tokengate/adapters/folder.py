"""Read an adapter's folder, trusting nothing in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from torch import Tensor

from tokengate.adapters.config import AdapterConfig, TensorConfig, from_dict
from tokengate.errors import TokenGateError, brief
from tokengate.files.strict_json import parse

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# In the weights' metadata: the configuration they were saved with, and the digest of the weights
# whose place they took. In the configuration: the digest of the weights it belongs to.
METADATA, PREVIOUS, SHA256 = "tokengate", "previous", "sha256"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that was read and checked."""

    folder: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    """On the CPU; `load` may make them a model's own."""


def read_adapter(folder: str | Path) -> SavedAdapter:
    """The adapter in `folder`, as `save` wrote it.

    What can be named is named: a tensor that is missing, or of another shape or dtype than the
    configuration says, or not finite. Then what was changed otherwise since it was saved is found
    by its digest. What another process replaces meanwhile is read again, so that nothing is of two
    adapters.

    Raises:
        TokenGateError: the folder or one of its files is missing, damaged or was changed.
    """
    folder = Path(folder)
    while True:
        before = _state(folder)
        try:
            adapter = _read(folder)
        except TokenGateError:
            if before == _state(folder):
                raise
        else:
            if before == _state(folder):
                return adapter


def _state(folder: Path) -> list[tuple[int, ...] | None]:
    """Another one when a file has been replaced, as by a process that saves meanwhile."""
    found: list[tuple[int, ...] | None] = []
    for name in (CONFIG, WEIGHTS):
        try:
            there = os.stat(folder / name)
            found.append((there.st_ino, there.st_size, there.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _read(folder: Path) -> SavedAdapter:
    for path in (folder, folder / CONFIG, folder / WEIGHTS):
        if not path.exists():
            raise TokenGateError(
                f"{str(path)!r} does not exist: pass a folder that tokengate.save wrote."
            )
    where = str(folder / CONFIG)
    found = read_config(folder)
    belongs_to = found.pop(SHA256, None)
    config = from_dict(found, where)
    metadata, present = header(folder / WEIGHTS)
    actual = digest(folder / WEIGHTS)
    if belongs_to != actual and belongs_to and metadata.get(PREVIOUS) == belongs_to:
        # `save` was killed after it had put the weights in place: they are whole, and newer.
        where = f"the metadata of {str(folder / WEIGHTS)!r}"
        found = parse(metadata.get(METADATA, ""), where)
        config = from_dict(found, where)
        actual = belongs_to
    _check_tensors(folder / WEIGHTS, config, present)
    tensors = finite_tensors(folder / WEIGHTS, config.tensors)
    if belongs_to != actual:
        raise TokenGateError(
            f"{str(folder / WEIGHTS)!r} is not what {where} was saved with: one of them was "
            "changed or copied alone, so save the adapter again."
        )
    _check_same(found, parse(metadata.get(METADATA, ""), str(folder / WEIGHTS)), where)
    return SavedAdapter(folder, config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `adapter_config.json`, of whatever format."""
    where = str(folder / CONFIG)
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenGateError(
            f"{where} could not be read ({brief(str(error))}): save the adapter again."
        ) from None
    return parse(text, where)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; takes no memory."""
    if tensor.numel() == 0:
        return True
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def own_config(path: Path) -> tuple[dict[str, Any], str]:
    """What weights that `save` wrote know as their configuration, and their digest.

    Both of one file, though another process may put its own there meanwhile: safetensors would
    open it twice.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size).decode("utf-8", "replace")
        metadata = parse(text, str(path)).get("__metadata__", {})
        file.seek(0)
        return parse(metadata.get(METADATA, ""), str(path)), _digest(file)


def header(path: Path) -> tuple[dict[str, str], dict[str, TensorConfig]]:
    """The metadata of a file of safetensors, and its tensors without their values."""

    def read() -> tuple[dict[str, str], dict[str, TensorConfig]]:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, {
                key: TensorConfig(str(part.get_dtype()), list(part.get_shape()))
                for key, part in slices.items()
            }

    found: tuple[dict[str, str], dict[str, TensorConfig]] = _readable(path, read)
    return found


def finite_tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """These tensors of the file, checked, in memory of their own."""

    def read() -> dict[str, Tensor]:
        found = {}
        for key in keys:
            # Opened for each, so that there is never more than one of them mapped beside its copy.
            with safe_open(path, "pt") as file:
                found[key] = file.get_tensor(key).clone()
        return found

    tensors: dict[str, Tensor] = _readable(path, read)
    for key, tensor in tensors.items():
        if not all_finite(tensor):
            raise TokenGateError(
                f"{str(path)!r} has a value that is not finite in {key!r}, of shape "
                f"{list(tensor.shape)}: save the adapter again."
            )
    return tensors


def _readable(path: Path, read: Any) -> Any:
    """What `read` gives; an error of ours for any of safetensors', whatever is in the file."""
    try:
        return read()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        raise TokenGateError(
            f"{str(path)!r} is no safetensors file that could be read ({brief(str(error))}): save "
            "the adapter again."
        ) from None


def _check_tensors(path: Path, config: AdapterConfig, present: dict[str, TensorConfig]) -> None:
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


def _check_same(found: dict[str, Any], saved: dict[str, Any], where: str) -> None:
    for key in sorted(found.keys() | saved.keys()):
        if found.get(key) != saved.get(key):
            raise TokenGateError(
                f"{where} was changed in {key!r} since it was saved: load the adapter as it is, "
                "change the model, and save it again."
            )
