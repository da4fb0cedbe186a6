"""What of a saved adapter fits a model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokengate.adapters.config import LayerConfig
from tokengate.adapters.folder import SavedAdapter
from tokengate.adapters.other_patch import (
    axes_of,
    divided_by,
    on_meta,
    other_experts,
    other_patch,
    otherwise_divided,
    slices_of_config,
    targets_of,
)
from tokengate.errors import TokenGateError, brief
from tokengate.gates.base import Gate, PenalisedGate
from tokengate.gates.registry import GATES, check_options
from tokengate.gates.stacked import parts_beside
from tokengate.layers.gated_linear import Gated
from tokengate.layers.sliced_linear import Sliced, slices_of
from tokengate.linears.accelerate_hooks import weights_present
from tokengate.linears.experts import StackedLinear
from tokengate.linears.linear_like import features_of, is_linear_like, whole
from tokengate.methods.base import Modification
from tokengate.methods.registry import METHODS
from tokengate.names import joined, named_modules, named_parameters, submodule
from tokengate.patching.stack_targets import stacked_projections
from tokengate.patching.targets import find_targets
from tokengate.patterns import FullName, nearest
from tokengate.sharding import divided_as, gathered

# How many misfits say which names would have come close; that takes all names each time.
_WITH_NEAREST = 8


class Fit:
    """What of an adapter fits a model; of a strict load, the first that does not is the error.

    Raises:
        TokenGateError: nobody has registered here what it is made of.
    """

    def __init__(self, saved: SavedAdapter, strict: bool) -> None:
        self.saved, self._strict = saved, strict
        self.misfits: dict[str, str] = {}
        for config in saved.config.layers.values():
            METHODS.check_saved(config.method, saved.folder)
            if config.gate is not None:
                GATES.check_saved(config.gate, saved.folder)

    def check_any(self, model: nn.Module, found: list[str]) -> None:
        """An error if nothing fits."""
        if not found:
            reason = next(iter(self.misfits.values()), "it is empty")
            raise TokenGateError(
                f"nothing of the adapter in {str(self.saved.folder)!r} fits this "
                f"{type(model).__name__}: {reason}."
            )

    def fill(self, name: str, modification: Modification, gate: Gate | None, fresh: bool) -> None:
        """Give a layer's parts what the adapter has for them; to fresh ones without a copy."""
        _fill(modification, self._values(f"{name}.modification.", modification), fresh)
        modification.was_loaded()
        if gate is not None:
            _fill(gate, self._values(f"{name}.gate.", gate), fresh)
            if isinstance(gate, PenalisedGate):
                gate.penalty = cast(float, self.saved.config.layers[name].penalty)
            gate.s = self.saved.config.layers[name].s

    def fill_extras(self, model: nn.Module, extras: dict[str, nn.Parameter]) -> None:
        """The same for parameters of the model."""
        for name in extras:
            owner, _, attribute = name.rpartition(".")
            holder = submodule(model, owner)
            _fill_one(holder, attribute, self.saved.tensors[name])
            extras[name] = getattr(holder, attribute)  # another object where it was on meta

    def agrees(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter of the model has the adapter's values already."""
        value = self.saved.tensors[name]
        return not parameter.is_meta and torch.equal(
            gathered(parameter).detach().cpu(), value.to(parameter.dtype)
        )

    def patched_layers(self, patched: dict[str, Gated]) -> dict[str, Gated]:
        """The layers whose values can be replaced."""
        found: dict[str, Gated] = {}
        for name, config in self.saved.config.layers.items():
            layer = patched.get(name)
            if layer is None:
                near = self._near(name, patched)
                self._reject(name, f"is in the adapter and not patched in the model{near}")
            elif reason := other_patch(layer, config):
                self._reject(name, reason)
            # Options that compare equal need not be valid: a rank of 8.0 is none.
            elif self._holds(name, self._on_meta(name, layer), None) and self._holds(
                name, layer.modification, layer.gate
            ):
                found[name] = layer
        for name in patched.keys() - self.saved.config.layers.keys():
            self._reject(name, "is patched in the model and not in the adapter")
        return found

    def new_layers(self, model: nn.Module, others: dict[str, Gated]) -> dict[str, Any]:
        """The layers that can be patched, each with its modification and gate, without values.

        Those that other adapters have patched already, too.
        """
        wanted = {}
        modules = dict(named_modules(model, remove_duplicate=False))
        modules |= self._stacks(model)
        for name, config in self.saved.config.layers.items():
            reason = self._unfit(name, config, modules)
            if reason:
                self._reject(name, reason)
            else:
                wanted[name] = config
        chosen: dict[str, Any] = {name: others[name] for name in wanted if name in others}
        if new := {name: config for name, config in wanted.items() if name not in others}:
            targets = [each for n, config in new.items() for each in targets_of(n, config, modules)]
            axes = {FullName(name): each for name, each in axes_of(new).items()}
            chosen |= find_targets(model, targets, None, divided_by(new) or None, axes or None)
        found: dict[str, Any] = {}
        for name, layer in chosen.items():
            config = wanted[name]
            method = METHODS.find(config.method)
            check_options(method, config.options)
            # On the meta device first: an adapter may claim any size.
            if not self._holds(name, self._on_meta(name, layer), None):
                continue
            modification, gate = self._made(name, layer)
            if self._holds(name, modification, gate):
                found[name] = (layer, modification, gate)
        return found

    def _stacks(self, model: nn.Module) -> dict[str, nn.Module]:
        """What the model holds of experts that are layers of the adapter, by name."""
        configs = self.saved.config.layers
        parameters = dict(named_parameters(model, remove_duplicate=False))
        axes = {
            FullName(name): each
            for name, each in axes_of(configs).items()
            if name in parameters and parameters[name].dim() == 3
        }
        found: dict[str, nn.Module] = {}
        names = {module: name for name, module in named_modules(model)}
        for module, own in stacked_projections(model, axes or None, divided_by(configs)).items():
            found |= {joined(names[module], name): each for name, each in own.items()}
        return {name: each for name, each in found.items() if name in configs}

    def extras(
        self, model: nn.Module, trained: dict[str, nn.Parameter] | None
    ) -> dict[str, nn.Parameter]:
        """The other parameters that get values; of a patched model those that it trains."""
        parameters = dict(named_parameters(model, remove_duplicate=False))
        found = {}
        for name in self.saved.config.train:
            value = self.saved.tensors.get(name)
            if value is None:
                self._reject(name, "was trained, and its values are not in the adapter")
            elif name not in parameters:
                near = self._near(name, parameters)
                self._reject(name, f"of shape {list(value.shape)} is not in the model{near}")
            elif trained is not None and name not in trained:
                self._reject(name, "is trained in the adapter and not by the model's patch")
            elif reason := _unequal(parameters[name], value):
                self._reject(name, reason)
            else:
                found[name] = parameters[name]
        return found

    def _values(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        """What the adapter has for a module's state."""
        return {key: self.saved.tensors[prefix + key] for key in module.state_dict()}

    def _holds(self, name: str, modification: Modification | None, gate: Gate | None) -> bool:
        """Whether the adapter has just what these have, in their shapes."""
        for part, module in (("modification", modification), ("gate", gate)):
            if module is None:
                continue
            prefix = f"{name}.{part}."
            saved = self.saved.under(prefix)
            expected = {prefix + key: t for key, t in module.state_dict().items()}
            for key in sorted(saved.keys() | expected.keys()):
                if key not in saved:
                    reason = f"lacks {key!r} of shape {list(expected[key].shape)}"
                elif key not in expected:
                    reason = f"has {key!r} of shape {list(saved[key].shape)}, which is unknown here"
                elif unequal := _unequal(expected[key], saved[key]):
                    reason = f"has {key!r}, which {unequal}"
                else:
                    continue
                self._reject(name, reason)
                return False
        return True

    def _on_meta(self, name: str, layer: Any) -> Modification | None:
        config = self.saved.config.layers[name]
        try:
            return on_meta(layer, config)
        except TokenGateError as error:
            raise TokenGateError(
                f"the adapter in {str(self.saved.folder)!r} has options for {name!r} that "
                f"{config.method!r} refuses: {error}"
            ) from None

    def _unfit(self, name: str, config: LayerConfig, modules: dict[str, nn.Module]) -> str | None:
        """Why the model has no layer of this name and shape."""
        own = name if config.slices is None or config.axes else name.rpartition(".")[0]
        layer = modules.get(own)
        if layer is None:
            linear = (n for n, m in modules.items() if is_linear_like(m))
            return f"is not in the model{self._near(own, linear)}"
        if isinstance(layer, StackedLinear) and config.axes is not None:
            there = layer.in_features, layer.out_features
            if (config.in_features, config.out_features) != there:
                return "has other features in the adapter than in the model"
            if config.experts is not None and config.experts[-1] >= len(layer.held):
                return f"is of expert {config.experts[-1]}, and the model has {len(layer.held)}"
            return other_experts(layer, config) if isinstance(layer, Gated) else None
        if not is_linear_like(layer):
            return f"is a {type(layer).__name__} in the model, which is no linear layer"
        there, outputs = features_of(cast(Any, layer)), config.out_features
        if (slices := slices_of_config(config)) is not None:
            part = name.rpartition(".")[2]
            if slices.sizes.get(part, 0) * slices.groups != outputs:
                return f"is no slice of {slices} with {outputs} outputs"
            if isinstance(layer, Sliced) and slices != slices_of(layer):
                return otherwise_divided(slices, slices_of(layer))
            outputs = slices.out_features
        saved = (config.in_features, outputs)
        if saved != there:
            return (
                f"has (in_features, out_features) {saved} in the adapter and {there} in the model"
            )
        return None

    def _made(self, name: str, layer: Any) -> tuple[Modification, Gate | None]:
        """The layer's modification and gate, whose options may be anything that JSON holds."""
        config = self.saved.config.layers[name]
        try:
            with weights_present(whole(layer)):
                return parts_beside(layer, partial(_made_of, config))
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise TokenGateError(
                f"the adapter in {str(self.saved.folder)!r} has options for {name!r} of which no "
                f"layer can be made ({brief(str(error))}): save it again."
            ) from error

    def _near(self, name: str, names: Iterable[str]) -> str:
        """Those that come closest, as the end of a reason; of many misfits, for the first ones."""
        return f"; {nearest(name, names)}" if len(self.misfits) < _WITH_NEAREST else ""

    def _reject(self, name: str, reason: str) -> None:
        if self._strict:
            raise TokenGateError(
                f"the adapter in {str(self.saved.folder)!r} does not fit: {name!r} {reason}; load "
                "it into the model it was saved from, or pass strict=False to skip what does not "
                "fit."
            )
        self.misfits[name] = reason


def _made_of(config: LayerConfig, linear: Any) -> tuple[Modification, Gate | None]:
    modification = METHODS.find(config.method)(linear, **config.options)
    modification.options = config.options
    if config.gate is None:
        return modification, None
    kind = GATES.find(config.gate)
    check_options(kind, config.gate_options)
    return modification, kind.beside(linear, **config.gate_options)


def _unequal(wanted: Tensor, found: Tensor) -> str | None:
    """Why a tensor cannot hold a value as it is."""
    if wanted.shape != found.shape:
        return f"has shape {list(found.shape)} in the adapter and {list(wanted.shape)} in the model"
    if torch.promote_types(wanted.dtype, found.dtype) != wanted.dtype:
        return (
            f"is {_short(found.dtype)} of shape {list(found.shape)} in the adapter and "
            f"{_short(wanted.dtype)} in the model, which cannot hold it"
        )
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fill(module: nn.Module, values: dict[str, Tensor], fresh: bool) -> None:
    for key, value in values.items():
        owner, _, attribute = key.rpartition(".")
        _fill_one(module.get_submodule(owner), attribute, value, fresh)


@torch.no_grad()
def _fill_one(owner: nn.Module, attribute: str, value: Tensor, fresh: bool = False) -> None:
    there = getattr(owner, attribute)
    if there.is_meta:
        new = value.to(there.dtype, copy=True)
        if isinstance(there, nn.Parameter):
            new = nn.Parameter(new, requires_grad=there.requires_grad)
        setattr(owner, attribute, new)
    elif fresh and there.device == value.device and there.dtype == value.dtype:
        there.data = value  # nothing was in it yet
    else:
        there.copy_(divided_as(value.to(there.device), there))
