"""Layers of bitsandbytes and torchao that hold W0 quantised, and its rows, a few at a time."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.linears.by_name import is_from

# On CPUs with AVX512-BF16, bitsandbytes keeps rows together in groups of this many.
_PACKED_ROWS = 32


def is_quantised(layer: nn.Linear) -> bool:
    """Whether the layer's weight stands for W0 in another form."""
    return is_four_bit(layer) or _scales(layer) is not None or is_torchao(layer.weight)


def is_four_bit(layer: nn.Linear) -> bool:
    """Whether it is bitsandbytes' 4-bit layer."""
    return is_from(layer, "bitsandbytes", "Linear4bit")


def dequantised_blocks(layer: nn.Linear, rows: int) -> Iterator[Tensor]:
    """W0 in consecutive blocks of about `rows` rows, `(rows, in_features)`, dequantised one by one.

    In the dtype that the library dequantises to. Only for a layer that is quantised and whose rows
    are not `unreadable`.
    """
    if is_four_bit(layer):
        return _four_bit_blocks(layer, rows)
    if is_torchao(layer.weight):
        return _torchao_blocks(layer, rows)
    return _eight_bit_blocks(layer, rows)


def unreadable(layer: nn.Linear) -> str | None:
    """Why W0 has no rows to read, as the end of a sentence with a remedy; None if it has."""
    weight = layer.weight
    if is_torchao(weight):
        try:
            next(_torchao_blocks(layer, 1))
        except Exception:  # each layout says in its own way what it cannot do
            return (
                f"torchao holds as {type(weight).__name__}, of which single rows cannot be "
                "dequantised: quantise in another format"
            )
        return None
    waits = is_four_bit(layer) and _state(layer) is None
    if is_from(layer, "bitsandbytes", "Linear8bitLt") and weight.is_floating_point():
        waits = not layer.state.has_fp16_weights  # type: ignore[union-attr]
    if waits:
        return "bitsandbytes has not quantised yet: move the layer to its device first"
    if not is_quantised(layer) and not weight.is_floating_point():
        return f"is held as {weight.dtype} here: dequantise the layer"
    return None


def blocks_gradients(layer: nn.Linear) -> bool:
    """Whether the layer quantises its input too, through which torchao passes no gradient."""
    # Int8Tensor and Float8Tensor call it by the first name, IntxUnpackedToInt8Tensor by the second.
    names = ("act_quant_kwargs", "activation_quantization")
    weight = layer.weight
    return is_torchao(weight) and any(getattr(weight, n, None) is not None for n in names)


def is_torchao(weight: Tensor) -> bool:
    """Whether it is a tensor class of torchao's."""
    # torch.compile can neither list the classes that a plain tensor has, nor read their module.
    if type(weight) in (Tensor, nn.Parameter):
        return False
    return type(weight).__module__.startswith("torchao.")


def _torchao_blocks(layer: nn.Linear, rows: int) -> Iterator[Tensor]:
    weight: Any = layer.weight
    for start in range(0, len(weight), rows):
        yield weight[start : start + rows].dequantize()


def _scales(layer: nn.Linear) -> Tensor | None:
    """What the rows of an 8-bit layer of bitsandbytes are scaled by, `(out_features,)`."""
    if not is_from(layer, "bitsandbytes", "Linear8bitLt") or layer.weight.is_floating_point():
        return None
    # The first forward moves them from the weight to the layer's state.
    for holder in (layer.weight, layer.state):
        scales: Tensor | None = getattr(holder, "SCB", None)
        if scales is not None:
            return scales
    return None


def _eight_bit_blocks(layer: nn.Linear, rows: int) -> Iterator[Tensor]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    weight, scales = _plain(layer.weight), _scales(layer)
    assert scales is not None
    for part, scale in zip(torch.split(weight, rows), torch.split(scales, rows), strict=True):
        yield functional.int8_vectorwise_dequant(part, scale)


def _state(layer: nn.Linear) -> Any:
    """How the weight of a 4-bit layer is to be read; None before it is quantised."""
    state = getattr(layer.weight, "quant_state", None)
    # Sharding may lose the weight's; the layer keeps another reference.
    return getattr(layer, "quant_state", None) if state is None else state


def _four_bit_blocks(layer: nn.Linear, rows: int) -> Iterator[Tensor]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    state = _state(layer)
    out_features, in_features = state.shape
    data = _plain(layer.weight).reshape(-1).view(torch.uint8)
    packed = getattr(state, "packing_format_for_cpu", False)
    if packed:
        # Transposed there, so that row j of W0 has column j.
        absmax = state.absmax.T
    else:
        # What bitsandbytes unpacks again, for a state dict, it leaves in two dimensions.
        absmax = state.absmax.reshape(-1)
        if state.nested:  # small: one number for each quantisation block
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    # A quantisation block is `blocksize` consecutive elements, across rows: begin with a whole one.
    whole = _PACKED_ROWS if packed else state.blocksize // math.gcd(in_features, state.blocksize)
    step = -(-rows // whole) * whole
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        first, last = start * in_features, stop * in_features
        part = data[first // 2 : -(-last // 2)]
        own = functional.QuantState(
            absmax=None,
            # As one row: on CPUs with AVX512 it misreads rows that are no whole blocks.
            shape=torch.Size((1, last - first)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        if packed:
            own.absmax = absmax[start:stop].float().reshape(-1)
            own.packing_format_for_cpu, own.original_nested = True, False
            own.original_dtype, own.original_qshape = state.original_dtype, part.shape
            unpack = functional._convert_weight_packed_for_cpu_inverse
            part, own = unpack(part.view(stop - start, -1), own)
        else:
            own.absmax = absmax[first // state.blocksize : -(-last // state.blocksize)]
        # The library takes a single byte for a transposed weight.
        yield functional.dequantize_4bit(part.view(-1, 1), own).reshape(-1, in_features)


def _plain(weight: Tensor) -> Tensor:
    """Without the subclass, whose slices would be taken for whole weights."""
    return weight.detach().as_subclass(Tensor)
