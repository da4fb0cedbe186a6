"""How the layers of an adapter were patched, and how that differs from those of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tokengate.adapters.config import LayerConfig
from tokengate.errors import TokenGateError, brief
from tokengate.gates.registry import GATES, check_options, with_defaults
from tokengate.gates.stacked import stacked
from tokengate.kernels.precision import trainable_dtype
from tokengate.layers.gated_linear import Gated
from tokengate.linears.experts import StackedLinear, some_experts
from tokengate.linears.linear_like import holder, stub_of
from tokengate.linears.slices import Slices
from tokengate.methods.base import Modification
from tokengate.methods.registry import METHODS
from tokengate.patching.slice_targets import slices_of_part
from tokengate.patterns import FullName


def axes_of(configs: Mapping[str, LayerConfig]) -> dict[str, str]:
    """Those of the parameters that hold experts, by the names of the parameters."""
    return {
        name if config.slices is None else name.rpartition(".")[0]: config.axes
        for name, config in configs.items()
        if config.axes is not None
    }


def divided_by(configs: Mapping[str, LayerConfig]) -> dict[FullName, Slices]:
    """How what is patched in part is divided, by the names of the whole."""
    found = {name.rpartition(".")[0]: slices_of_config(config) for name, config in configs.items()}
    return {FullName(name): slices for name, slices in found.items() if slices is not None}


def otherwise_divided(saved: Slices | None, own: Slices | None) -> str:
    """That two fused layers hold other projections, in words."""
    return f"is of {saved or 'no slices'} in the adapter and of {own or 'no slices'} in the model"


def other_experts(layer: nn.Module, config: LayerConfig) -> str | None:
    """How the experts of a patched projection differ from the saved one's."""
    own = some_experts(layer)
    if own == config.experts:
        return None
    saved, there = (
        "all experts" if e is None else f"the experts {brief(e)}" for e in (config.experts, own)
    )
    return f"is of {saved} in the adapter and of {there} in the model"


def slices_of_config(config: LayerConfig) -> Slices | None:
    """How what a saved layer is a slice of is divided; None of one that is no slice."""
    return None if config.slices is None else Slices(groups=config.groups, **config.slices)


def targets_of(name: str, config: LayerConfig, modules: dict[str, nn.Module]) -> list[FullName]:
    """A layer as `patch` names it: by its name, or some experts by theirs."""
    layer = modules.get(name)
    if isinstance(layer, StackedLinear) and config.experts is not None:
        return [FullName(each) for each in layer.of(config.experts).names_of_experts(name)]
    return [FullName(name)]


def on_meta(layer: Any, config: LayerConfig) -> Modification | None:
    """The modification that saved options make beside `layer`, without memory.

    None if the method needs a real layer for it.

    Raises:
        TokenGateError: the method refuses them.
    """
    dtype = trainable_dtype(holder(layer))
    stub: Any = stub_of(layer, config.in_features, config.out_features, dtype)
    try:
        made = METHODS.find(config.method)(stub, **config.options)
        return stacked([made] * layer.num_experts) if isinstance(layer, StackedLinear) else made
    except TokenGateError:
        raise
    except Exception:
        return None


def other_patch(layer: Gated, config: LayerConfig) -> str | None:
    """How a patched layer differs from how the saved one was patched."""
    saved, own = slices_of_config(config), slices_of_part(layer)
    if saved != own:
        return otherwise_divided(saved, own)
    if reason := other_experts(layer, config):
        return reason
    kind = type(layer.modification)
    if (method := METHODS.name_of(kind)) != config.method:
        return f"is {config.method!r} in the adapter and {method or kind.__name__!r} here"
    if (layer.gate is None) != (config.gate is None):
        gated, ungated = ("adapter", "model") if layer.gate is None else ("model", "adapter")
        return f"has a gate in the {gated} and none in the {ungated}"
    if layer.gate is not None and (found := GATES.name_of(type(layer.gate))) != config.gate:
        return f"has the gate {config.gate!r} in the adapter and {found!r} here"
    if layer.gate is not None:
        # What training starts from, and its own penalty, may differ.
        free = ("tau", "penalty", "start")
        there = with_defaults(type(layer.gate), config.gate_options)
        here = with_defaults(type(layer.gate), layer.gate.options)
        for option in sorted((there.keys() | here.keys()) - set(free)):
            if there.get(option) != here.get(option):
                return (
                    f"has a gate with {option}={brief(there.get(option))} in the adapter and "
                    f"{option}={brief(here.get(option))} in the model"
                )
    check_options(kind, config.options)
    there = with_defaults(kind, config.options)
    here = with_defaults(kind, layer.modification.options)
    for option in sorted(there.keys() | here.keys()):
        if option != "dropout" and there.get(option) != here.get(option):
            return (
                f"has {option}={brief(there.get(option))} in the adapter and "
                f"{option}={brief(here.get(option))} in the model"
            )
    return None
