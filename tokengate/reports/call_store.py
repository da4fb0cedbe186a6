"""S and r of every call, small: a bit and 16 bits for each position, beyond a limit on disk."""

from __future__ import annotations

import ctypes
import hashlib
import math
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError, brief

# What stands for a call in the array of its module: the numbers of the shape of its S and of its
# shape by samples (B, T), and where its S, its padding mask and its r begin, or _NONE.
_SHAPE, _BY_SAMPLE, _OPEN, _REAL, _RATIOS, _FIELDS = range(6)
_NONE = -1
_Shape: TypeAlias = tuple[int, ...]


class CallStore:
    """The calls of modules by name, in the order they were made.

    Args:
        memory: bytes of S, masks and r that are kept in memory; with the next ones, all of them go
            to a temporary file, which nobody else sees and which goes with the store. Beside them,
            40 bytes for each call stay in memory.
        folder: of that file; None is the system's own for temporary files.
    """

    def __init__(self, memory: int, folder: Path | str | None) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise TokenGateError(
                f"folder={brief(str(folder))} is no folder: pass one that exists, or None."
            )
        within = None if folder is None else str(folder)
        self._bytes: Any = tempfile.SpooledTemporaryFile(memory, dir=within)  # noqa: SIM115
        weakref.finalize(self, self._bytes.close)
        self._end = 0
        self._calls: dict[str, array[int]] = {}
        self._shapes: list[_Shape] = []
        self._numbers: dict[_Shape, int] = {}
        self._measured: set[str] = set()
        self._masks: dict[bytes, int] = {}  # by digest, as many modules share one

    def add(
        self, name: str, is_open: Tensor, real: Tensor, ratios: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Keep S, `(...)`, what is no padding, `(B, T)`, and r, `(...)`.

        The first two are returned, as `(B, T)` on the CPU.
        """
        both = torch.stack([is_open.flatten(), real.flatten()]).cpu()
        call = [_NONE] * _FIELDS
        call[_SHAPE] = self._number(tuple(is_open.shape))
        call[_BY_SAMPLE] = self._number(tuple(real.shape))
        call[_OPEN] = self._write(content_of(packed(both[0])))
        if not both[1].all():
            bits = content_of(packed(both[1]))
            digest = hashlib.blake2b(bits, digest_size=16).digest()
            if digest not in self._masks:
                self._masks[digest] = self._write(bits)
            call[_REAL] = self._masks[digest]
        if ratios is not None:
            self._measured.add(name)
            call[_RATIOS] = self._write(content_of(ratios.to("cpu", torch.float16)))
        self._calls.setdefault(name, array("q")).extend(call)
        opened, kept = both.reshape(2, *real.shape)
        return opened, kept

    @property
    def names(self) -> list[str]:
        """The modules that were called, in the order of their first calls."""
        return list(self._calls)

    def count(self, name: str) -> int:
        """The calls of a module."""
        return len(self._calls[name]) // _FIELDS

    def is_open(self, name: str, call: int) -> Tensor:
        """S of a call, `(...)`."""
        shape = self._shape(name, call, _SHAPE)
        return self._flags(self._field(name, call, _OPEN), shape)

    def has_ratios(self, name: str) -> bool:
        """Whether r was kept of a module, which had a gate then."""
        return name in self._measured

    def ratios(self, name: str, call: int) -> Tensor:
        """r of a call, `(...)` in float16; NaN where it was not measured."""
        start, shape = self._field(name, call, _RATIOS), self._shape(name, call, _SHAPE)
        if start == _NONE:
            return torch.full(shape, torch.nan, dtype=torch.float16)
        return _tensor(self._read(start, 2 * math.prod(shape)), torch.float16).reshape(shape)

    def real(self, name: str, call: int) -> Tensor:
        """What is no padding in a call, `(B, T)`."""
        start, shape = self._field(name, call, _REAL), self.by_sample(name, call)
        if start == _NONE:
            return torch.ones(shape, dtype=torch.bool)
        return self._flags(start, shape)

    def by_sample(self, name: str, call: int) -> _Shape:
        """The samples of a call and their length, (B, T)."""
        return self._shape(name, call, _BY_SAMPLE)

    def likeness(self, name: str) -> tuple[bytes, bytes]:
        """Equal for modules whose calls had the same samples: as many, as long, as padded."""
        calls = self._calls[name]
        return calls[_BY_SAMPLE::_FIELDS].tobytes(), calls[_REAL::_FIELDS].tobytes()

    def _number(self, shape: _Shape) -> int:
        if shape not in self._numbers:
            self._numbers[shape] = len(self._shapes)
            self._shapes.append(shape)
        return self._numbers[shape]

    def _field(self, name: str, call: int, field: int) -> int:
        return self._calls[name][call * _FIELDS + field]

    def _shape(self, name: str, call: int, field: int) -> _Shape:
        return self._shapes[self._field(name, call, field)]

    def _write(self, content: bytes) -> int:
        start, self._end = self._end, self._end + len(content)
        self._bytes.seek(start)
        self._bytes.write(content)
        return start

    def _read(self, start: int, length: int) -> bytes:
        self._bytes.seek(start)
        content: bytes = self._bytes.read(length)
        return content

    def _flags(self, start: int, shape: _Shape) -> Tensor:
        count = math.prod(shape)
        bits = _tensor(self._read(start, -(-count // 8)), torch.uint8)
        flags = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
        return flags.flatten()[:count].bool().reshape(shape)


class KeptCalls(Mapping[str, list[Tensor]]):
    """What was kept of all calls by module; a module's tensors are made when it is asked for."""

    def __init__(
        self,
        store: CallStore | None,
        read: Callable[[CallStore, str, int], Tensor],
        has: Callable[[CallStore, str], bool] = lambda store, name: True,
        what: str = "positions",
    ) -> None:
        self._kept, self._read, self._has, self._what = store, read, has, what

    @property
    def _store(self) -> CallStore:
        if self._kept is None:
            how = "positions=True" + ", ratios=True" * (self._what == "ratios")
            raise TokenGateError(
                f"no {self._what} were recorded: run the model inside `with tokengate.record("
                f"model, {how}):`."
            )
        return self._kept

    def __getitem__(self, name: str) -> list[Tensor]:
        if name not in self:
            raise KeyError(name)
        return [self._read(self._store, name, call) for call in range(self._store.count(name))]

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)

    def __iter__(self) -> Iterator[str]:
        return iter([n for n in self._store.names if self._has(self._store, n)])

    def __len__(self) -> int:
        return sum(1 for _ in self)  # list(self) would ask for the length


def packed(flags: Tensor) -> Tensor:
    """Eight to a byte, the first the lowest: `(..., N) -> (..., ceil(N / 8))`, on the CPU."""
    padded = nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).to(torch.uint8)
    eights = torch.unflatten(padded, -1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
    octets: Tensor = eights.sum(-1, dtype=torch.uint8)
    return octets


def content_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the CPU, as they lie in memory."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""


def _tensor(content: bytes, dtype: torch.dtype) -> Tensor:
    if not content:  # which torch.frombuffer refuses
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype)  # it warns of what is read-only
