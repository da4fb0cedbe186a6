"""A file of safetensors, opened once and read from its beginning to its end, trusting nothing.

safetensors itself maps the file, so that somebody who shortens it meanwhile ends the process, and
knows nothing of the file's digest, for which it would be read twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tokengate.adapters.config import TensorConfig
from tokengate.errors import TokenGateError, brief
from tokengate.files.regular import open_regular
from tokengate.files.strict_json import parse

#: What an adapter's values may be, as safetensors names it.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# In bytes. safetensors writes no longer header; values are read in blocks of the second.
_LONGEST_HEADER, _BLOCK = 100_000_000, 1 << 20
_LONGEST_NAME = 2000
#: How many values an adapter's JSON holds at most: those of 21,000 layers, read in two seconds.
MOST_VALUES = 1_200_000


@dataclass(frozen=True)
class Weights:
    """A file whose header was read and checked."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorConfig]
    """In the order of their values in the file."""
    sizes: dict[str, int]
    """Of their values, in bytes."""
    _file: BinaryIO
    _header: bytes

    def values(self, leave_out: Collection[str] = ()) -> tuple[dict[str, Tensor], str]:
        """The tensors, finite and each in memory of its own, and the SHA-256 of the whole file.

        It takes the memory of what it returns.

        Args:
            leave_out: tensors that are only passed over.

        Raises:
            TokenGateError: one is of another dtype than `DTYPES`, or has a value that is not
                finite; the file has become shorter.
        """
        for key in self.tensors:
            if key not in leave_out:
                self.check_dtype(key)
        digest = hashlib.sha256(self._header)
        found: dict[str, Tensor] = {}
        for keys in self._together():
            if keys[0] in leave_out:
                self._read(sum(self.sizes[key] for key in keys), torch.uint8, digest)
                continue
            counts = [math.prod(self.tensors[key].shape) for key in keys]
            try:
                flat = self._read(sum(counts), DTYPES[self.tensors[keys[0]].dtype], digest)
                parts = [flat]
                if len(keys) > 1:
                    parts = [part.clone() for part in torch.split(flat, counts)]
            except (MemoryError, RuntimeError) as error:  # torch's, of what it cannot allocate
                raise _unreadable(self.path, error) from None
            if not all_finite(flat):
                key = next(k for k, part in zip(keys, parts, strict=True) if not all_finite(part))
                raise TokenGateError(
                    f"{str(self.path)!r} has a value that is not finite in {key!r}, of shape "
                    f"{self.tensors[key].shape}: save the adapter again."
                )
            for key, part in zip(keys, parts, strict=True):
                found[key] = part.reshape(self.tensors[key].shape)
        return found, digest.hexdigest()

    def _together(self) -> Iterator[list[str]]:
        """Neighbours of one dtype and no more than a block, so that small ones cost little each."""
        keys: list[str] = []
        size, dtype = 0, ""
        for key, each in self.tensors.items():
            own = self.sizes[key]
            if keys and (each.dtype != dtype or size + own > _BLOCK):
                yield keys
                keys, size = [], 0
            keys.append(key)
            size, dtype = size + own, each.dtype
        if keys:
            yield keys

    def digest(self) -> str:
        """The SHA-256 of the whole file, without its values."""
        digest = hashlib.sha256(self._header)
        while block := self._file.read(_BLOCK):
            digest.update(block)
        return digest.hexdigest()

    def check_dtype(self, key: str) -> None:
        """An error if a tensor is of another dtype than `DTYPES`."""
        found = self.tensors[key]
        if found.dtype not in DTYPES:
            raise TokenGateError(
                f"{str(self.path)!r} has {key!r} of shape {found.shape} as {brief(found.dtype)}, "
                f"and the values of an adapter are {', '.join(DTYPES)}: save the adapter again."
            )

    def _read(self, count: int, dtype: torch.dtype, digest: Any) -> Tensor:
        """So many values, which come next in the file."""
        flat = torch.empty(count, dtype=dtype)
        for part in torch.split(flat, _BLOCK // flat.itemsize) if count else ():
            block = bytearray(part.nbytes)
            if self._file.readinto(block) != len(block):  # type: ignore[attr-defined]
                raise _unreadable(self.path, "it has become shorter")
            digest.update(block)
            if sys.byteorder == "big":
                block = _swapped(block, flat.itemsize)
            part.copy_(torch.frombuffer(block, dtype=dtype))
        return flat


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """The file at `path`, its header read.

    Raises:
        TokenGateError: it is no file of safetensors.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        try:
            header = _header(file)
            found = parse(header[8:].decode("utf-8"), "its header", "adapter", MOST_VALUES)
            metadata = found.pop("__metadata__", {})
            tensors, sizes = _tensors(found, os.fstat(file.fileno()).st_size - len(header))
            if not (isinstance(metadata, dict) and all(map(_is_text, metadata.values()))):
                raise ValueError(f"its metadata are {brief(metadata)}")
        except (OSError, ValueError, MemoryError) as error:
            raise _unreadable(path, error) from None
        yield Weights(path, metadata, tensors, sizes, file, header)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; takes no memory."""
    if tensor.numel() == 0:
        return True
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def _header(file: BinaryIO) -> bytes:
    """Its size and its text."""
    size = file.read(8) or b""
    length = int.from_bytes(size, "little")
    if len(size) < 8 or not 2 <= length <= _LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes")
    text = file.read(length) or b""
    if len(text) < length:
        raise ValueError(f"it ends within its header of {length} bytes")
    return size + text


def _tensors(found: dict[str, Any], size: int) -> tuple[dict[str, TensorConfig], dict[str, int]]:
    """What the header says of the tensors, whose values are all that follows, without a gap."""
    places = sorted((_place(key, entry), key) for key, entry in found.items())
    end = 0
    for (begin, its_end), key in places:
        entry = found[key]
        known = DTYPES.get(entry["dtype"])
        wanted = its_end - begin if known is None else _bytes(entry["shape"], known.itemsize)
        if begin != end or its_end - begin != wanted:
            raise ValueError(f"the values of {key!r} are not where its shape and others ask for")
        end = its_end
    if end != size:
        raise ValueError(f"its header is of {end} bytes of values, and {size} are there")
    tensors = {key: TensorConfig(found[key]["dtype"], found[key]["shape"]) for _, key in places}
    return tensors, {key: its_end - begin for (begin, its_end), key in places}


def _place(key: str, entry: Any) -> tuple[int, int]:
    if len(key) > _LONGEST_NAME:
        raise ValueError(f"{brief(key)} has {len(key)} characters, and no module's name so many")
    fields = {"dtype", "shape", "data_offsets"}
    if isinstance(entry, dict) and entry.keys() == fields and _is_text(entry["dtype"]):
        shape, place = entry["shape"], entry["data_offsets"]
        if _are_sizes(shape) and _are_sizes(place) and len(place) == 2 and place[0] <= place[1]:
            return place[0], place[1]
    raise ValueError(f"it says {brief(entry)} of {key!r}")


def _bytes(shape: list[int], itemsize: int) -> int:
    """Of a tensor; torch's strides have 64 bits even where it has no value."""
    if math.prod([size or 1 for size in shape]) * itemsize >= 1 << 63:
        raise ValueError(f"no tensor has the shape {brief(shape)}")
    return math.prod(shape) * itemsize


def _is_text(found: Any) -> bool:
    return isinstance(found, str)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(size) is int and size >= 0 for size in found)


def _swapped(block: bytearray, itemsize: int) -> bytearray:
    """From the order of bytes that the file has to that of a machine with the other one."""
    swapped = bytearray(len(block))
    for place in range(itemsize):
        swapped[place::itemsize] = block[itemsize - 1 - place :: itemsize]
    return swapped


def _unreadable(path: Path, error: object) -> TokenGateError:
    return TokenGateError(
        f"{str(path)!r} is no safetensors file that could be read ({brief(str(error))}): save the "
        "adapter again."
    )
