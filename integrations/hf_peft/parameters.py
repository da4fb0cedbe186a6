"""Experts' 3-D parameters as PEFT adapts them, by its `target_parameters`.

Each parameter of a module has a wrapper around that of the one before it, so that the last one's
keys have the name of the module, and each other's one `base_layer` more. A wrapper has A as
`(experts * rank, in_features)` and B as `(out_features, rank * experts)`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.integrations.hf_peft.names import Names
from tokengate.linears.experts import StackedLinear
from tokengate.names import joined, named_modules, named_parameters
from tokengate.patching.stack_targets import stacked_projections

BASE = ".base_layer"


def wrapped(model: nn.Module, is_target: Callable[[str], bool]) -> dict[str, str]:
    """The parameters that PEFT adapts, by the names of their wrappers."""
    found = {}
    for prefix, module in named_modules(model):
        own = [joined(prefix, name) for name, p in module._parameters.items() if p is not None]
        for depth, name in enumerate(filter(is_target, reversed(own) if prefix else ())):
            found[prefix + depth * BASE] = name
    return found


@dataclass(frozen=True)
class Adapted:
    """What of a model's parameters an adapter of PEFT has values for."""

    experts: dict[str, tuple[str, StackedLinear]]
    """The names and projections of experts' parameters, by the names of their wrappers."""
    unfit: dict[str, str]
    """What is none of those, or has no values, and why, as the end of a sentence."""
    astray: list[str]
    """What has values and is no wrapper of such a parameter."""


def adapted(model: nn.Module, axes: Any, names: Names, found: Collection[str]) -> Adapted:
    """Sort out the wrappers that the adapter has values for.

    Args:
        model: as PEFT had it.
        axes: those of its experts, as `patch(experts=...)` has them.
        names: what the configuration says.
        found: what has values and is none of its target_modules.

    Raises:
        TokenGateError: `axes` does not fit the model, or names take too long.
    """
    experts, unfit = {}, {}
    named, known = wrapped(model, names.is_target_parameter), _stacks(model, axes)
    for wrapper, name in named.items():
        if wrapper not in found:
            unfit[name] = "is one of its target_parameters, and the adapter has no values for it"
        elif name not in known:
            unfit[name] = (
                "is one of its target_parameters, and no stack of experts' matrices that is known: "
                "say how it is laid out, as in experts={'experts.w1': 'eoi'}, if it is one, or "
                "train its layer by target_modules"
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


def _stacks(model: nn.Module, axes: Any) -> dict[str, StackedLinear]:
    names = {module: name for name, module in named_modules(model)}
    return {
        joined(names[owner], key): layer
        for owner, own in stacked_projections(model, axes, None).items()
        for key, layer in own.items()
        if isinstance(layer, StackedLinear) and layer.part is None
    }


def ours(values: dict[str, Tensor], rank: int, layer: StackedLinear) -> dict[str, Tensor]:
    """A `(experts, rank, in_features)` and B `(experts, out_features, rank)`."""
    A, B = values["A"], values["B"]
    A = A.unflatten(0, (-1, rank))
    B = B.unflatten(1, (rank, -1)).permute(2, 0, 1)
    return _exchanged(A, B, layer)


def theirs(values: dict[str, Tensor], layer: StackedLinear) -> dict[str, Tensor]:
    """The way back."""
    found = _exchanged(values["A"], values["B"], layer)
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


def check_writable(model: nn.Module, experts: Collection[str]) -> None:
    """An error if PEFT would find other parameters by these names, or none."""
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
