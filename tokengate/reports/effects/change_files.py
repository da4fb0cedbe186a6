"""M(x) of every position, written while the model runs, for other tools to look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from tokengate.arguments import count
from tokengate.errors import TokenGateError, brief
from tokengate.files.atomic_write import write_atomically
from tokengate.files.text_table import size
from tokengate.gates.deciding import Observer
from tokengate.layers.batches import check_batches, evaluating, named, run
from tokengate.layers.calls import RECORD, in_context
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import require_layers
from tokengate.layers.several import refuse_several
from tokengate.linears.experts import StackedLinear
from tokengate.patterns import Pattern, as_patterns, matches, nearest, show
from tokengate.reports.call_store import content_of

# How safetensors calls what is written here.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL",
}  # fmt: skip
_INPUTS = ("input_ids", "attention_mask")


def export_changes(
    model: nn.Module,
    batches: Iterable[Any],
    folder: str | Path,
    *,
    modules: Any = None,
    dtype: torch.dtype | None = None,
    limit: int = 2**30,
) -> list[Path]:
    """Write M(x) of every position of every patched layer, as safetensors:

        files = tokengate.export_changes(model, loader, "outputs/changes", dtype=torch.float16)
        found = safetensors.torch.load_file(files[0])
        found["model.layers.3.mlp.down_proj"]         # M(x), (B, T, out_features)
        found["model.layers.3.mlp.down_proj.open"]    # S, (B, T): where it was added

    One file for each batch, and in it for each call of a layer by its name: M(x) as it is before
    the gate, padding included, and S. A layer that is called again in one forward has `#1`, `#2`
    and so on behind its name. Of a batch that is a dict, `input_ids` and `attention_mask` are
    there, too.

    M(x) is large: `out_features` numbers for each position and module, where a report keeps one
    bit. What a layer gives is written at once, so that memory holds that of one call; the disk
    holds a batch twice while its file is made. The model is in evaluation mode meanwhile, without
    gradients, and nothing of it changes.

    Args:
        model: a patched model.
        batches: what it is called with: dicts by keyword, tuples by position.
        folder: of the files, `batch-00000.safetensors` and so on; made if it is not there. What an
            earlier call with more batches wrote stays there.
        modules: those to write, by names, globs or regular expressions, as `patch` takes targets;
            None for all.
        dtype: to write M(x) in, where float16 has what is above 65,504 as infinite; None for its
            own.
        limit: the bytes that all of it may take together: 1 GiB, if not told otherwise.

    Returns:
        The files.

    Raises:
        TokenGateError: no layer is patched; a name is unknown, or of experts; `use` was given
            rows; there is no batch; more than `limit` would be written: the batches before are
            there then.
        OSError: a file cannot be written.
    """
    patched = require_layers(model, "export_changes")
    batches = check_batches("export_changes", batches)
    if dtype is not None and not (dtype in _DTYPES and dtype.is_floating_point):
        raise TokenGateError(
            f"dtype={brief(dtype)} was asked for M(x): pass torch.float32, torch.float16 or "
            "torch.bfloat16, or None for its own."
        )
    chosen = patched if modules is None else _chosen(patched, as_patterns("modules", modules))
    held = [name for name, layer in chosen.items() if isinstance(layer, StackedLinear)]
    if held:
        raise TokenGateError(
            f"export_changes was asked for {brief(held[0])}, which are experts, whose M(x) is of "
            "the rows that are routed to each and of no (B, T): pass modules= without it."
        )
    refuse_several("export_changes", chosen)
    files: list[Path] = []
    left = count("limit", limit)
    for i, batch in enumerate(batches):
        path = Path(folder) / f"batch-{i:05d}.safetensors"
        writer = _Writer(chosen, dtype, left, limit)
        write_atomically(path, partial(writer.write, model, batch))
        left -= writer.written
        files.append(path)
    return files


def _chosen(patched: Mapping[str, Gated], wanted: list[Pattern]) -> dict[str, Gated]:
    for pattern in wanted:
        if not any(matches(pattern, name) for name in patched):
            raise TokenGateError(
                f"export_changes was asked for {show(pattern)}, which is no patched layer: pass "
                f"names of tokengate.layers(model), or None for all; {nearest(pattern, patched)}."
            )
    if not wanted:
        raise TokenGateError(
            "export_changes was asked for no module: pass names of tokengate.layers(model), or "
            "None for all."
        )
    return {n: layer for n, layer in patched.items() if any(matches(p, n) for p in wanted)}


class _Writer:
    """One file: what comes is appended to its data, whose places its head says in the end."""

    def __init__(
        self, layers: Mapping[str, Gated], dtype: torch.dtype | None, left: int, limit: int
    ) -> None:
        self._layers, self._dtype, self._left, self._limit = layers, dtype, left, limit
        self._head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.written = 0
        self._itemsize = 4  # of M(x), in bytes
        self._data: IO[bytes]
        self._pending: dict[str, Tensor] = {}

    def write(self, model: nn.Module, batch: Any, path: Path) -> None:
        """Run the model, and put what it gave into the file."""
        observers = {
            layer: Observer(
                partial(self._told, name), change=partial(self._pending.__setitem__, name)
            )
            for name, layer in self._layers.items()
        }
        data = path.with_name("data")
        with open(data, "wb") as self._data:
            inputs = named(model, batch)
            for name in _INPUTS:
                if isinstance(given := inputs.get(name), Tensor) and given.dtype in _DTYPES:
                    self._add(name, given)
            with evaluating(model), in_context(RECORD, observers):
                run(model, batch)
        head = json.dumps(self._head).encode()
        head += b" " * (-len(head) % 8)
        with open(path, "wb") as file, open(data, "rb") as source:
            file.write(len(head).to_bytes(8, "little") + head)
            shutil.copyfileobj(source, file)
        data.unlink()

    def _told(self, name: str, is_open: Tensor | None, h: Tensor, *_: Any) -> None:
        m = self._pending.pop(name, None)
        if m is None:  # it has no modification here
            return
        if self._layers[name]._sequence_first and m.dim() == 3:
            m = m.transpose(0, 1)  # samples come first in what is told
        key, again = name or "model", 0
        while key in self._head:
            again += 1
            key = f"{name or 'model'}#{again}"
        m = m if self._dtype is None else m.to(self._dtype)
        self._itemsize = m.itemsize
        self._add(key, m)
        opened = torch.ones(h.shape[:-1], dtype=torch.bool) if is_open is None else is_open
        self._add(f"{key}.open", opened)

    def _add(self, name: str, tensor: Tensor) -> None:
        begin, self.written = self.written, self.written + tensor.nbytes
        if self.written > self._left:
            one = self._itemsize * sum(
                cast(int, layer.out_features) for layer in self._layers.values()
            )
            raise TokenGateError(
                f"export_changes came to more than limit={size(self._limit)} at {name!r}: M(x) of "
                f"{len(self._layers)} modules takes {size(one)} for each position, so pass fewer "
                "modules or positions, dtype=torch.float16, or a larger limit."
            )
        self._head[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self.written],
        }
        self._data.write(content_of(tensor.detach().cpu()))
