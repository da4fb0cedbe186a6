"""Write a patched model's adapter as Hugging Face PEFT would have saved it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokengate import TokenGateError
from tokengate.adapters.folder import CONFIG as OURS
from tokengate.adapters.folder import read_config
from tokengate.errors import brief
from tokengate.files.atomic_write import make_folder, save_tensors, write_atomically, write_text
from tokengate.integrations.hf_peft.format import (
    CONFIG,
    HEADS,
    KEYS,
    PREFIX,
    WEIGHTS,
)
from tokengate.integrations.hf_peft.names import ModulesToSave, only
from tokengate.layers.folded import Folded, base_layer
from tokengate.layers.gated_linear import Gated
from tokengate.linears.experts import StackedLinear
from tokengate.linears.linear_like import LinearSlice, is_transposed
from tokengate.methods.registry import METHODS
from tokengate.names import named_modules, named_parameters, submodule


def the_method(patched: Mapping[str, Gated | Folded]) -> str:
    """The one method of all layers; an error if PEFT has none like it, or there are several."""
    first: tuple[str, str] | None = None
    for name, layer in patched.items():
        kind = type(layer.modification)
        method = METHODS.name_of(kind)
        base = base_layer(layer)
        are_experts = isinstance(base, StackedLinear)
        is_slice = isinstance(base, LinearSlice) or (are_experts and base.part is not None)
        has_equal = method == "lora" if are_experts else method in KEYS
        if is_slice or not name or not has_equal:
            what = "experts in a 3-D parameter, modified" if are_experts else "modified"
            what = "a slice of a fused layer" if is_slice else what
            what = what if name else "the whole model,"
            raise TokenGateError(
                f"export_peft found {name!r}, {what} by {method or kind.__name__!r}, which PEFT "
                f"has no equal for: only whole layers inside a model with {', '.join(KEYS)} have "
                "one, and experts' parameters with lora; use tokengate.save."
            )
        if first is not None and first[1] != method:
            raise TokenGateError(
                f"export_peft found {first[0]!r} modified by {first[1]!r} and {name!r} by "
                f"{method!r}, and one adapter of PEFT has one method: use tokengate.save."
            )
        first = first or (name, method)
    assert first is not None
    return first[1]


def check_open(
    patched: Mapping[str, Gated | Folded], values: dict[str, Tensor], ungated: bool
) -> None:
    """An error if a gate may close, since PEFT would load the adapter without it."""
    for name, layer in patched.items():
        if layer.gate is not None and f"{name}.gate.tau" not in values and not ungated:
            raise TokenGateError(
                f"export_peft found {name!r} gated by {type(layer.gate).__name__}, and PEFT has no "
                "gates, so that every position would be modified: pass ungated=True if that is "
                "what you want."
            )
    taus = {n: values[k].max().item() for n in patched if (k := f"{n}.gate.tau") in values}
    closing = {name: tau for name, tau in taus.items() if tau > 0}
    if closing and not ungated:
        name, tau = max(closing.items(), key=lambda item: item[1])
        raise TokenGateError(
            f"export_peft found tau above 0 in {len(closing)} of {len(patched)} layers, e.g. "
            f"tau={tau:.4g} in {name!r}, and PEFT has no gates, so that every position would be "
            "modified: pass ungated=True if that is what you want, or use tokengate.save."
        )


def whole_modules(model: nn.Module, trained: dict[str, nn.Parameter]) -> list[str]:
    """The modules whose parameters are all trained beside the layers, as PEFT can save them."""
    shared = Counter(id(p) for _, p in named_parameters(model, remove_duplicate=False))
    owners: list[str] = []
    for name, parameter in trained.items():
        owner = name.rpartition(".")[0]
        left = [
            key for key in submodule(model, owner).state_dict() if f"{owner}.{key}" not in trained
        ]
        reason = ""
        if not owner:
            reason = "is a parameter of the model itself"
        elif left:
            reason = f"is a part of {owner!r}, whose {left[0]!r} is not trained"
        elif shared[id(parameter)] > 1:
            reason = "is tied to another parameter, which PEFT would not change along"
        elif "lora_" in name:
            reason = "has 'lora_' in its name, which PEFT takes for a part of the adapter"
        if reason:
            raise TokenGateError(
                f"export_peft found {name!r} trained beside the layers, which {reason}, and PEFT "
                "saves whole modules: train= those, or use tokengate.save."
            )
        if not any(owner == o or owner.startswith(f"{o}.") for o in owners):
            owners = [o for o in owners if not o.startswith(f"{owner}.")] + [owner]
    return owners


def stacked(patched: Mapping[str, Gated | Folded]) -> list[str]:
    """Those of the layers that are experts' 3-D parameters."""
    return [n for n, layer in patched.items() if isinstance(base_layer(layer), StackedLinear)]


def check_names(model: nn.Module, layers: list[str], heads: list[str], task: str | None) -> None:
    """An error if PEFT would take other modules than `heads` for its modules_to_save."""
    if task is not None and task not in list(HEADS):
        raise TokenGateError(f"task_type={brief(task)} is unknown: choose of {', '.join(HEADS)}.")
    modules = [*heads, *(HEADS[task] if task else ())]
    whole = ModulesToSave(modules)
    for name, _ in named_modules(model, remove_duplicate=False):
        if whole.are(name) and not any(
            name == head or name.startswith(f"{head}.") for head in heads
        ):
            raise TokenGateError(
                f"export_peft found {name!r}, which PEFT would train too with modules_to_save="
                f"{brief(modules)}, and which was not: train= it too, leave task_type= out, or "
                "rename the module."
            )
    for name in layers:
        if whole.would_hold(name):
            raise TokenGateError(
                f"export_peft found the layer {name!r}, which PEFT would take for a part of "
                f"modules_to_save={brief(modules)} and not adapt: rename one of them."
            )


def target_modules(model: nn.Module, layers: list[str]) -> list[str] | str:
    """The layers by their full names; a regular expression where one ends another's name."""
    others = {name for name, _ in named_modules(model)} - set(layers)
    if any(other.endswith(f".{layer}") for other in others for layer in layers):
        return "|".join(only(layer).removeprefix("^") for layer in layers)
    return layers


def lora_config(patched: Mapping[str, Gated | Folded]) -> dict[str, Any]:
    """Rank and alpha: the most frequent, and for other layers patterns that match them alone."""
    ranks = {name: layer.modification.rank for name, layer in patched.items()}
    alphas = {name: _alpha(layer.modification) for name, layer in patched.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {only(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {only(n): a for n, a in alphas.items() if a != alpha},
    }


def _alpha(modification: Any) -> float:
    given = modification.options.get("alpha")
    # PEFT computes alpha / rank, whatever the scale came from.
    exact = given is not None and given / modification.rank == modification.scale
    alpha = float(given if exact else modification.scale * modification.rank)
    return int(alpha) if alpha.is_integer() else alpha


def adalora_config(
    patched: Mapping[str, Gated | Folded], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Ranks and alpha; `tensors`, with PEFT's keys, are changed so that they fit them.

    PEFT has one scale for all layers: what a layer's is more goes into its E. Rows whose E is 0,
    as a `RankAllocator` leaves them, are pruned; before any training, none.
    """
    rank = max(layer.modification.rank for layer in patched.values())
    scales = (layer.modification.scale for layer in patched.values())
    scale = next(filter(None, scales), 1.0)  # one that was set to 0 is the other's factor alone
    untrained = all((tensors[f"{PREFIX}{name}.lora_E"] == 0).all() for name in patched)
    pattern = {}
    for name, layer in patched.items():
        p, e, q = (f"{PREFIX}{name}.{suffix}" for suffix in KEYS["adalora"].values())
        kept = torch.ones_like(tensors[e], dtype=torch.bool) if untrained else tensors[e] != 0
        tensors[p] = tensors[p][:, kept].contiguous()
        tensors[q] = tensors[q][kept]
        tensors[e] = tensors[e][kept].unsqueeze(1) * (layer.modification.scale / scale)
        mask = kept.tolist() + [False] * (rank - len(kept))
        if not all(mask):
            pattern[f"{name}.lora_E"] = mask
    if "default" in "".join(pattern):
        raise TokenGateError(
            f"export_peft found {next(k for k in pattern if 'default' in k)!r} with pruned rows: "
            "PEFT takes 'default' in a name for its adapter's and would not find the layer; use "
            "tokengate.save."
        )
    targets = [layer.modification.target_rank for layer in patched.values()]
    return {
        "init_r": rank,
        "target_r": round(sum(targets) / len(targets)),
        "lora_alpha": scale * (rank + 1e-5),
        "rank_pattern": pattern or None,
        # PEFT loads nothing without; a new training has its own.
        "total_step": 1,
    }


def shared_config(
    model: nn.Module, patched: Mapping[str, Gated | Folded], heads: list[str]
) -> dict[str, Any]:
    """What both kinds of configuration have."""
    experts = stacked(patched)
    linear = [name for name in patched if name not in experts]
    dropouts = {layer.modification.dropout: name for name, layer in patched.items()}
    if len(dropouts) > 1:
        (one, first), (two, second) = list(dropouts.items())[:2]
        raise TokenGateError(
            f"export_peft found dropout={one} in {first!r} and {two} in {second!r}, and one "
            "adapter of PEFT has one: set modification.dropout of all layers to the same."
        )
    if experts and any(dropouts):
        raise TokenGateError(
            f"export_peft found dropout={next(iter(dropouts))}, and PEFT has none with experts' "
            "parameters: set modification.dropout of all layers to 0."
        )
    return {
        **({"target_parameters": experts} if experts else {}),
        "bias": "none",
        "fan_in_fan_out": all(is_transposed(base_layer(layer)) for layer in patched.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": next(iter(dropouts)),
        "modules_to_save": heads or None,
        "target_modules": target_modules(model, linear) if linear else [],
    }


def check_folder(folder: Path) -> None:
    """An error if PEFT's files cannot be there, or would replace an adapter with its taus."""
    if folder.exists() and not folder.is_dir():
        raise TokenGateError(
            f"export_peft was given {str(folder)!r}, which is a file: name a folder."
        )
    theirs = folder / CONFIG
    if (folder / OURS).exists() or (theirs.exists() and "peft_type" not in read_config(theirs)):
        raise TokenGateError(
            f"export_peft was given {str(folder)!r}, which holds an adapter that is not PEFT's and "
            "would be replaced: name another folder."
        )


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files, each of them whole or not at all; a process killed between leaves the weights.

    PEFT refuses those alone, where it would take an older configuration for theirs.
    """
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)

    def write_weights(path: Path) -> None:
        save_tensors(tensors, path, {"format": "pt"})
        (folder / CONFIG).unlink(missing_ok=True)

    make_folder(folder)
    write_atomically(folder / WEIGHTS, write_weights)
    write_text(folder / CONFIG, text)
