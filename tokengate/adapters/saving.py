"""Save an adapter: what was trained, and how to patch a model so that it fits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.adapters.base_model import class_name, fingerprint, origin, samples
from tokengate.adapters.card import write_card
from tokengate.adapters.config import AdapterConfig, LayerConfig, TensorConfig
from tokengate.adapters.destination import check_destination, has_old_config
from tokengate.adapters.folder import (
    CONFIG,
    METADATA,
    OLD_CONFIG,
    PREVIOUS,
    SHA256,
    WEIGHTS,
    config_path,
    digest,
    own_config,
    read_config,
    with_digest,
)
from tokengate.adapters.other_patch import on_meta
from tokengate.adapters.weights import NAMES, all_finite
from tokengate.arguments import in_our_words
from tokengate.errors import TokenGateError, brief
from tokengate.files.atomic_write import make_folder, save_tensors, write_atomically, write_text
from tokengate.gates.base import Gate, PenalisedGate
from tokengate.gates.registry import GATES
from tokengate.layers.coverage import check_present
from tokengate.layers.folded import Folded, base_layer, folded
from tokengate.layers.gated_linear import Gated
from tokengate.layers.named_adapters import check_name, reading
from tokengate.layers.patched import all_layers, layers, own_parameters, require_layers
from tokengate.linears.experts import StackedLinear, some_experts
from tokengate.methods.registry import METHODS
from tokengate.names import check_module, named_parameters
from tokengate.patching.patch import asked_of
from tokengate.patching.slice_targets import slices_of_part
from tokengate.patching.wrappers import check_gathered
from tokengate.reports.provenance import version_of
from tokengate.reports.report import SparsityReport
from tokengate.sharding import gathered, is_divided, present


@in_our_words(
    same={"adapter_name": "name", "adapter": "name"},
    otherwise={
        "safe_serialization": "leave it out, as all is written as safetensors",
        "selected_adapters": "save one after the other, by name=",
    },
)
def save(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    report: SparsityReport | None = None,
) -> None:
    """Write the adapter of a patched model into `folder`: what `load` needs beside the base model.

    `adapter_model.safetensors` has the modifications, the taus, and the other parameters that
    `patch(train=...)` named; `tokengate_config.json` how every layer was patched, and what the base
    is; `README.md`, the model card, says it to people, and stays as it is where somebody else wrote
    it. An adapter that is there already is replaced, in an instant: a process that is killed while
    saving leaves the old one or the new one. Nothing is pickled.

    Of several processes that save into one folder at once, the last one's adapter is left there,
    if none of them is killed meanwhile. What FSDP2 or ZeRO-3 has divided is gathered: call it on
    every process, of which the first writes. Otherwise call it on one. Names are the model's
    own, whatever wraps it or a part of it: DistributedDataParallel, torch.compile, activation
    checkpointing, an averaged copy.

    Args:
        model: a patched model.
        folder: made if it is not there.
        name: of several adapters, see `use`; that in use by default.
        report: of this adapter, e.g. `record(model)`'s; its table comes into the model card.

    Raises:
        TokenGateError: no layer is patched; a method has no name, or an option that JSON does not
            know; a value is not finite, not there (on the meta device, elsewhere under ZeRO-3, in
            pieces under FSDP1) or of a dtype that is not floating-point; `folder` is a file, or
            holds a model, or an adapter that is not ours.
        OSError: the folder cannot be written.
    """
    check_module("save", model)
    if name is not None:
        check_name(name)
    if report is not None and not isinstance(report, SparsityReport):
        raise TokenGateError(
            f"report is a {type(report).__name__}: pass a SparsityReport, e.g. that of "
            "tokengate.record."
        )
    with reading(model, name):
        _save(model, Path(folder), report)


def _save(model: nn.Module, folder: Path, report: SparsityReport | None) -> None:
    patched = what_modifies(model, "save")
    check_destination(folder)
    tensors = values_of(model, patched, "save")
    base_id, base_revision = origin(model)
    config = AdapterConfig(
        tokengate_version=version_of("tokengate"),
        base_class=class_name(model),
        base_fingerprint=fingerprint(model),
        layers={name: _layer_config(name, layer) for name, layer in patched.items()},
        tensors={name: TensorConfig(NAMES[t.dtype], list(t.shape)) for name, t in tensors.items()},
        targets=[_shown(call) for call in asked_of(model)],
        train=sorted(trained_beside(model, patched)),
        base_id=base_id,
        base_revision=base_revision,
        base_values=samples(model),
    )
    text = _as_json(config)
    if is_divided(model.parameters()) and torch.distributed.get_rank() > 0:
        return
    make_folder(folder)
    metadata = {"format": "pt", METADATA: text, PREVIOUS: _previous(folder)}
    # The weights come first and know their own configuration, and whose place they took: between
    # the two renamings `load` can tell that they are the newer ones.
    write_atomically(folder / WEIGHTS, lambda path: save_tensors(tensors, path, metadata))
    _write_config(folder)
    write_card(folder, config, report)


def _write_config(folder: Path) -> None:
    """Write the configuration of the weights that are in place, as they know it themselves.

    They may be another process's, which has saved meanwhile: whoever looks last puts it right.
    """
    written = ""
    while written != digest(folder / WEIGHTS):
        own, written = own_config(folder / WEIGHTS)
        write_text(folder / CONFIG, with_digest(own, written))
    if has_old_config(folder):
        (folder / OLD_CONFIG).unlink(missing_ok=True)


def what_modifies(model: nn.Module, caller: str) -> dict[str, Gated | Folded]:
    """The layers with a modification; what is merged has one that is added everywhere."""
    check_present(model, caller)
    check_gathered(model, caller)
    merged: dict[str, Gated | Folded] = {
        name: saved for name, each in folded(model).items() if (saved := each.to_save()) is not None
    }
    if not (merged or layers(model)) and folded(model):
        raise TokenGateError(
            f"{caller} was asked of a model all of whose modifications were dropped by fold, so "
            "that it is its base: call the folding's undo() for what they were."
        )
    # Of experts some may be merged, and some in a layer.
    return merged | (layers(model) if merged else require_layers(model, caller)) | merged


def trained_beside(
    model: nn.Module, patched: Mapping[str, Gated | Folded]
) -> dict[str, nn.Parameter]:
    """What is trained apart from modifications and taus, by name."""
    own = own_parameters([*patched.values(), *all_layers(model).values()])
    return {n: p for n, p in named_parameters(model) if p.requires_grad and id(p) not in own}


def values_of(
    model: nn.Module, patched: Mapping[str, Gated | Folded], caller: str
) -> dict[str, Tensor]:
    """The values of an adapter by name, on the CPU and checked; errors name the `caller`."""
    found: dict[str, Tensor] = {}
    beside = trained_beside(model, patched)
    parts = [m for layer in patched.values() for m in (layer.modification, layer.gate) if m]
    with present([*(p for part in parts for p in part.parameters()), *beside.values()]):
        for name, layer in patched.items():
            layer.modification.refresh(base_layer(layer))
            for part, module in (("modification", layer.modification), ("gate", layer.gate)):
                if module is not None:
                    found |= {f"{name}.{part}.{key}": t for key, t in module.state_dict().items()}
        found |= {name: p.detach() for name, p in beside.items()}
        return {name: _whole(name, tensor, caller) for name, tensor in found.items()}


def _whole(name: str, tensor: Tensor, caller: str) -> Tensor:
    """On the CPU, contiguous and of its own; checked."""
    if tensor.is_meta:
        raise TokenGateError(
            f"{caller} found no values of {name!r}, which is on the meta device: load it first."
        )
    if tensor.dtype not in NAMES:
        raise TokenGateError(
            f"{caller} found {name!r} of dtype {tensor.dtype}: only floating-point values are "
            "saved, so keep others in a buffer with persistent=False."
        )
    copied = gathered(tensor).detach().to("cpu", copy=True).contiguous()
    if not all_finite(copied):
        raise TokenGateError(
            f"{caller} found a value that is not finite in {name!r}, and wrote nothing: go back to "
            "the last adapter before training diverged."
        )
    return copied


def _layer_config(name: str, layer: Gated | Folded) -> LayerConfig:
    kind = type(layer.modification)
    method = METHODS.name_of(kind)
    if method is None:
        raise TokenGateError(
            f"save found {name!r} modified by {kind.__name__}, by which name `load` could not find "
            'it: decorate the class with @tokengate.register("...").'
        )
    gate = layer.gate
    linear = base_layer(layer)
    slices = slices_of_part(linear)
    config = LayerConfig(
        method=method,
        options=dict(layer.modification.options),
        in_features=layer.modification.in_features,
        out_features=layer.modification.out_features,
        penalty=gate.penalty if isinstance(gate, PenalisedGate) else None,
        s=None if gate is None or gate.relative else gate.s,
        slices=None if slices is None else dict(slices.sizes),
        groups=1 if slices is None else slices.groups,
        axes=linear.stack.axes if isinstance(linear, StackedLinear) else None,
        experts=some_experts(linear),
        gate=None if gate is None else _gate_name(name, gate),
        gate_options={} if gate is None else dict(gate.options),
    )
    try:
        if config.options != layer.modification._options:  # those were checked when it was made
            on_meta(linear, config)
    except TokenGateError as error:
        raise TokenGateError(
            f"save found options of {name!r} that {method!r} refuses, as load would: {error}"
        ) from None
    return config


def _gate_name(name: str, gate: Gate) -> str:
    found = GATES.name_of(type(gate))
    if found is None:
        raise TokenGateError(
            f"save found {name!r} gated by {type(gate).__name__}, by which name `load` could not "
            'find it: decorate the class with @tokengate.register_gate("...").'
        )
    return found


def _as_json(config: AdapterConfig) -> str:
    for name, layer in config.layers.items():
        for option, value in [*layer.options.items(), *layer.gate_options.items()]:
            try:
                same = json.loads(json.dumps(value, allow_nan=False)) == value
            except (TypeError, ValueError):
                same = False
            if not same:
                raise TokenGateError(
                    f"save found {option}={brief(value)} in {name!r}, which JSON cannot hold: give "
                    "method and gate options of numbers, texts, lists and None."
                )
    return json.dumps(config.to_dict(), indent=1, allow_nan=False)


def _shown(call: dict[str, Any]) -> dict[str, Any]:
    def one(pattern: Any) -> Any:
        if isinstance(pattern, str) or pattern is None:
            return pattern
        if isinstance(pattern, re.Pattern):
            return {"regex": pattern.pattern}
        return {"callable": getattr(pattern, "__qualname__", brief(pattern))}

    return {
        key: [one(p) for p in value] if isinstance(value, (list, tuple)) else one(value)
        for key, value in call.items()
    }


def _previous(folder: Path) -> str:
    """The digest of the weights that the configuration in `folder` belongs to; empty if none."""
    try:
        return str(read_config(config_path(folder)).get(SHA256, ""))
    except TokenGateError:  # none there, or none that could be read
        return ""
