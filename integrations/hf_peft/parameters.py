"""Experts' 3-D parameters as PEFT adapts them, by its `target_parameters`.

Each parameter of a module has a wrapper around that of the one before it, so that the last one's
keys have the name of the module, and each other's one `base_layer` more. A wrapper has A as
`(experts * rank, in_features)` and B as `(out_features, rank * experts)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.integrations.hf_peft.names import Names
from tokengate.linears.experts import StackedLinear
from tokengate.names import inside, joined, named_modules, named_parameters
from tokengate.patching.stack_targets import stacked_projections

BASE = ".base_layer"

# Names that were of experts' layers before transformers 5 made them parameters, by the kinds of
# models it has for that. Of these models PEFT takes whatever LoRA is to adapt by such a name, by
# its last word and in dense layers too, for the experts.
_TAKEN_FOR_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def wrapped(model: nn.Module, is_target: Callable[[str], bool]) -> dict[str, str]:
    """The parameters that PEFT adapts, by the names of their wrappers."""
    found = {}
    for prefix, module in named_modules(model):
        own = [joined(prefix, name) for name, p in module._parameters.items() if p is not None]
        for depth, name in enumerate(filter(is_target, reversed(own) if prefix else ())):
            found[prefix + depth * BASE] = name
    return found


def stacks(model: nn.Module, axes: Any) -> dict[str, StackedLinear]:
    """The projections of experts whose layout is known, by the names of their parameters.

    Args:
        model: as PEFT had it.
        axes: those of its experts, as `patch(experts=...)` has them.

    Raises:
        TokenGateError: `axes` does not fit the model.
    """
    names = {module: name for name, module in named_modules(model)}
    return {
        joined(names[owner], key): layer
        for owner, own in stacked_projections(model, axes, None).items()
        for key, layer in own.items()
        if isinstance(layer, StackedLinear) and layer.part is None
    }


@dataclass(frozen=True)
class Adapted:
    """What of a model's parameters an adapter of PEFT has values for."""

    experts: dict[str, tuple[str, StackedLinear]]
    """The names and projections of experts' parameters, by the names of their wrappers."""
    unfit: dict[str, str]
    """What is none of those, or has no values, and why, as the end of a sentence."""
    astray: list[str]
    """What has values and is no wrapper of such a parameter."""


def adapted(
    model: nn.Module, known: dict[str, StackedLinear], names: Names, found: Collection[str]
) -> Adapted:
    """Sort out the wrappers that the adapter has values for.

    Args:
        model: as PEFT had it.
        known: its `stacks`.
        names: what the configuration says.
        found: what has values and is none of its target_modules.

    Raises:
        TokenGateError: names take too long.
    """
    experts, unfit = {}, {}
    named = wrapped(model, names.is_target_parameter)
    for wrapper, name in named.items():
        if wrapper not in found:
            unfit[name] = "is one of its target_parameters, and the adapter has no values for it"
        elif name not in known:
            unfit[name] = (
                "is one of its target_parameters, and is not known to be experts' matrices: if it "
                f"is, say how it is laid out, as in experts={{{name!r}: 'eoi'}}; if it is a "
                "router's or a bias, train without it, e.g. with a list in place of 'all-linear'"
            )
        else:
            experts[wrapper] = name, known[name]
    astray = []
    for wrapper in found:
        if wrapper in named:
            continue
        if names.holds_parameters(wrapper.replace(BASE, "")):
            unfit[wrapper] = "has values of its target_parameters, and is not in the model"
        else:
            astray.append(wrapper)
    return Adapted(experts, unfit, astray)


def ours(values: dict[str, Tensor], rank: int, layer: StackedLinear) -> dict[str, Tensor]:
    """A `(experts, rank, in_features)` and B `(experts, out_features, rank)`."""
    A, B = values["A"], values["B"]
    A = A.unflatten(0, (-1, rank))
    B = B.unflatten(1, (rank, -1)).permute(2, 0, 1)
    return _exchanged(A, B, layer)


def theirs(values: dict[str, Tensor], layer: StackedLinear) -> dict[str, Tensor]:
    """The way back; of experts that are not patched, A and B are 0."""
    every = {}
    for name, own in values.items():
        zeros = own.new_zeros(len(layer.held), *own.shape[1:])
        every[name] = zeros.index_copy(0, torch.tensor(layer.experts), own)
    found = _exchanged(every["A"], every["B"], layer)
    B = found["B"].permute(1, 2, 0).flatten(1)
    return {"A": found["A"].flatten(0, 1), "B": B.contiguous()}


def _exchanged(A: Tensor, B: Tensor, layer: StackedLinear) -> dict[str, Tensor]:
    """Both, transposed and in each other's place where PEFT takes inputs for outputs.

    Its product, which it adds to the parameter, is the same either way. It believes an attribute of
    the module alone, where here the shapes are asked too.
    """
    if bool(getattr(layer.owner, "is_transposed", False)) != (layer.stack.axes == "eio"):
        A, B = B.mT, A.mT
    return {"A": A.contiguous(), "B": B.contiguous()}


def check_config(config: dict[str, Any], where: str) -> None:
    """An error if it asks of parameters what PEFT does not do with them."""
    found = config.get("target_parameters") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise TokenGateError(
            f"{where} has target_parameters={brief(found)}: correct it to a list of names."
        )
    for key, off in (("peft_type", "LORA"), ("use_dora", False), ("lora_dropout", 0.0)):
        if found and (value := config.get(key)) not in (off, None):
            raise TokenGateError(
                f"{where} has target_parameters={brief(found)} with {key}={brief(value)}, and PEFT "
                f"adapts parameters by LORA without DoRA and dropout alone: correct it to {off!r}."
            )


def check_writable(
    model: nn.Module, experts: Collection[str], linear: Collection[str], method: str
) -> None:
    """An error if PEFT would find other parameters by these names, or none."""
    for name in linear if method != "adalora" else ():
        if name.rpartition(".")[2] in _taken_for_experts(model):
            raise TokenGateError(
                f"export_peft found {name!r}, and in a {type(model).__name__} PEFT takes this name "
                "for its experts', and would leave the layer out: patch others, or use "
                "tokengate.save."
            )
    others = [n for n, _ in named_parameters(model, remove_duplicate=False) if n not in experts]
    for name in experts:
        if "." not in name:
            raise TokenGateError(
                f"export_peft found {name!r}, a parameter of the model itself, which PEFT cannot "
                "adapt: use tokengate.save."
            )
        if same := next((other for other in others if other.endswith(f".{name}")), None):
            raise TokenGateError(
                f"export_peft found {name!r}, by which name PEFT would adapt {same!r} too: patch "
                "both, or use tokengate.save."
            )


def _taken_for_experts(model: nn.Module) -> tuple[str, ...]:
    kind = getattr(getattr(inside(model), "config", None), "model_type", None)
    table = sys.modules.get("transformers.conversion_mapping")
    kinds = {**getattr(table, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    return _TAKEN_FOR_EXPERTS.get(kinds.get(kind, ""), ())
