"""Load a saved adapter into a model, patched or not."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokengate.accelerate_hooks import weights_present
from tokengate.adapter_config import LayerConfig
from tokengate.adapter_folder import SavedAdapter, read_adapter
from tokengate.errors import TokenGateError, brief
from tokengate.folded import folded
from tokengate.gate import TokenGate
from tokengate.gated_linear import Gated, all_layers, require_layers
from tokengate.linear_like import LinearLike, LinearSlice, features_of, is_linear, whole
from tokengate.modifications import Modification
from tokengate.modifications.registry import check_options, find_method, name_of, with_defaults
from tokengate.named_adapters import (
    DEFAULT,
    adapter_names,
    add_adapter,
    check_name,
    put_in_use,
    rename,
    use,
)
from tokengate.patching import check_can_patch, install
from tokengate.patterns import nearest
from tokengate.precision import trainable_dtype
from tokengate.saving import class_name, fingerprint, trained_beside
from tokengate.sharding import divided_as, gathered
from tokengate.sliced_linear import Sliced, slices_of
from tokengate.slices import Slices
from tokengate.targets import find_targets


class DifferentBaseWarning(UserWarning):
    """A model has other linear layers than the one that an adapter was trained on."""


def load(
    model: nn.Module, folder: str | Path, *, name: str | None = None, strict: bool = True
) -> dict[str, str]:
    """Give `model` the adapter that `save` wrote into `folder`, in place.

    A model without a patched layer is patched as the saved one was: what the adapter has is
    trainable, everything else frozen. In a patched model, whose layers must be patched in the same
    way (but for dropout), the values are replaced, and every parameter stays the object it was.
    Parameters that `patch(train=...)` had named are loaded along; `unpatch` does not give their old
    values back.

    Everything is checked first: an error leaves the model untouched. On the meta device the
    adapter's parameters get their values on the CPU, so that the base can be loaded after it, with
    `model.load_state_dict(..., strict=False, assign=True)`. In a model sharded by FSDP2 every
    process calls it and keeps its own part.

    Args:
        model: the base model, or one that is patched.
        folder: what `save` was given.
        name: of the adapter; by default it is the one in use, or the first.
        strict: False skips the layers and parameters that do not fit this model.

    Returns:
        What was skipped, and why, by the name of the layer or parameter; empty if nothing was.

    Raises:
        TokenGateError: the folder is damaged or was changed; or something of it does not fit.

    Warns:
        DifferentBaseWarning: what the adapter has fits, but the model's linear layers are not all
            those of the model it was saved from.
    """
    if not isinstance(model, nn.Module):
        raise TokenGateError(f"load was given a {type(model).__name__}: pass a torch.nn.Module.")
    if name is not None:
        check_name(name)
    return load_saved(model, read_adapter(folder), "load", name=name, strict=strict)


def load_saved(
    model: nn.Module,
    saved: SavedAdapter,
    caller: str,
    *,
    name: str | None = None,
    strict: bool = True,
) -> dict[str, str]:
    """As `load`, with what was read; without a fingerprint, any base is the right one."""
    if folded(model):
        raise TokenGateError(
            f"{caller} was asked of a model that is folded: call the folding's undo() or "
            "tokengate.unpatch(model) first."
        )
    fit = _Fit(saved, strict)
    known = adapter_names(model)
    if known and (name is None or name in known):
        with contextlib.nullcontext() if name is None else use(model, name):
            _replace(model, fit)
    else:
        _add(model, fit, name or DEFAULT, caller)
    if saved.config.base_fingerprint not in ("", fingerprint(model)):
        warnings.warn(
            f"the adapter in {str(saved.folder)!r} was saved from a {saved.config.base_class}, "
            f"whose linear layers are not all those of this {class_name(model)}: make sure that "
            "it is the same base.",
            DifferentBaseWarning,
            stacklevel=3,
        )
    return fit.misfits


def _replace(model: nn.Module, fit: _Fit) -> None:
    """New values for the adapter in use."""
    patched = require_layers(model, "load")
    found = fit.patched_layers(patched)
    extras = fit.extras(model, trained_beside(model, patched))
    fit.check_any(model, [*found, *extras])
    for name, layer in found.items():
        fit.fill(name, layer.modification, layer.gate)
    fit.fill_extras(model, extras)


def _add(model: nn.Module, fit: _Fit, own_name: str, caller: str) -> None:
    """Another adapter, or the first."""
    check_can_patch(model, caller)
    others = all_layers(model)
    in_use = next((layer._in_use for layer in others.values()), own_name)
    planned = fit.new_layers(model, others)
    extras = fit.extras(model, None)
    fit.check_any(model, [*planned, *extras])
    for name, parameter in extras.items():
        if others and not fit.agrees(name, parameter):
            raise TokenGateError(
                f"the adapter in {str(fit.saved.folder)!r} has trained {name!r}, which is not one "
                "layer's, and the model's other adapters would get its values, too: load it into a "
                "model of its own."
            )
    for name, (_, modification, gate) in planned.items():
        fit.fill(name, modification, gate)
    fit.fill_extras(model, extras)
    for name in planned.keys() & others.keys():
        add_adapter(others[name], own_name, *planned[name][1:])
    new = {name: plan for name, plan in planned.items() if name not in others}
    if new or not others:
        asked = [{"targets": list(planned), "exclude": None, "train": list(extras)}]
        install(model, list(new.values()), extras, asked)
    for name in new:
        layer = all_layers(model)[name]
        rename(layer, own_name)
        put_in_use(layer, in_use)


class _Fit:
    """What of an adapter fits a model; of a strict load, the first that does not is the error."""

    def __init__(self, saved: SavedAdapter, strict: bool) -> None:
        self.saved, self._strict = saved, strict
        self.misfits: dict[str, str] = {}

    def check_any(self, model: nn.Module, found: list[str]) -> None:
        """An error if nothing fits."""
        if not found:
            reason = next(iter(self.misfits.values()), "it is empty")
            raise TokenGateError(
                f"nothing of the adapter in {str(self.saved.folder)!r} fits this "
                f"{type(model).__name__}: {reason}."
            )

    def fill(self, name: str, modification: Modification, gate: TokenGate | None) -> None:
        """Give a layer's parts what the adapter has for them."""
        _fill(modification, self._values(f"{name}.modification.", modification))
        if gate is not None:
            _fill(gate, self._values(f"{name}.gate.", gate))
            gate.penalty = cast(float, self.saved.config.layers[name].penalty)
            gate.s = self.saved.config.layers[name].s

    def fill_extras(self, model: nn.Module, extras: dict[str, nn.Parameter]) -> None:
        """The same for parameters of the model."""
        for name in extras:
            owner, _, attribute = name.rpartition(".")
            holder = model.get_submodule(owner)
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
                near = nearest(name, patched)
                self._reject(name, f"is in the adapter and not patched in the model; {near}")
            elif reason := _other_patch(layer, config):
                self._reject(name, reason)
            elif self._holds(name, layer.modification, layer.gate):
                found[name] = layer
        for name in patched.keys() - self.saved.config.layers.keys():
            self._reject(name, "is patched in the model and not in the adapter")
        return found

    def new_layers(self, model: nn.Module, others: dict[str, Gated]) -> dict[str, Any]:
        """The layers that can be patched, each with its modification and gate, without values.

        Those that other adapters have patched already, too.
        """
        wanted = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, config in self.saved.config.layers.items():
            reason = _unfit(name, config, modules)
            if reason:
                self._reject(name, reason)
            else:
                wanted[name] = config
        slices = {
            name.rpartition(".")[0]: divided
            for name, config in wanted.items()
            if (divided := _slices_of(config)) is not None
        }
        if not wanted:
            return {}
        chosen: dict[str, Any] = {name: others[name] for name in wanted if name in others}
        if new := [_exactly(name) for name in wanted if name not in others]:
            given = {
                _exactly(name): each
                for name, each in slices.items()
                if any(n.startswith(f"{name}.") and n not in others for n in wanted)
            }
            chosen |= find_targets(model, new, None, given or None)
        found: dict[str, Any] = {}
        for name, layer in chosen.items():
            config = wanted[name]
            method = find_method(config.method)
            check_options(method, config.options)
            # On the meta device first: an adapter may claim any size.
            if not self._holds(name, _on_meta(method, config, whole(layer).weight), None):
                continue
            with weights_present(whole(layer)):
                weight = layer.weight
                modification = method(layer, **config.options)
                modification.options = dict(config.options)
                gate = None
                if config.penalty is not None:
                    device = "cpu" if weight.is_meta else weight.device
                    gate = TokenGate(0.0, 0.0, dtype=trainable_dtype(weight), device=device)
            if self._holds(name, modification, gate):
                found[name] = (layer, modification, gate)
        return found

    def extras(
        self, model: nn.Module, trained: dict[str, nn.Parameter] | None
    ) -> dict[str, nn.Parameter]:
        """The other parameters that get values; of a patched model those that it trains."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = {}
        for name in self.saved.config.train:
            value = self.saved.tensors.get(name)
            if value is None:
                self._reject(name, "was trained, and its values are not in the adapter")
            elif name not in parameters:
                near = nearest(name, parameters)
                self._reject(name, f"of shape {list(value.shape)} is not in the model; {near}")
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

    def _holds(self, name: str, modification: Modification | None, gate: TokenGate | None) -> bool:
        """Whether the adapter has just what these have, in their shapes."""
        for part, module in (("modification", modification), ("gate", gate)):
            if module is None:
                continue
            prefix = f"{name}.{part}."
            saved = {k: t for k, t in self.saved.tensors.items() if k.startswith(prefix)}
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

    def _reject(self, name: str, reason: str) -> None:
        if self._strict:
            raise TokenGateError(
                f"the adapter in {str(self.saved.folder)!r} does not fit: {name!r} {reason}; load "
                "it into the model it was saved from, or pass strict=False to skip what does not "
                "fit."
            )
        self.misfits[name] = reason


def _exactly(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name))


def _unfit(name: str, config: LayerConfig, modules: dict[str, nn.Module]) -> str | None:
    """Why the model has no layer of this name and shape."""
    own = name if config.slices is None else name.rpartition(".")[0]
    layer = modules.get(own)
    if layer is None:
        return (
            f"is not in the model; {nearest(own, (n for n, m in modules.items() if is_linear(m)))}"
        )
    if not is_linear(layer):
        return f"is a {type(layer).__name__} in the model, which is no linear layer"
    there = features_of(cast(LinearLike, layer))
    outputs = config.out_features
    if (slices := _slices_of(config)) is not None:
        part = name.rpartition(".")[2]
        if slices.sizes.get(part, 0) * slices.groups != outputs:
            return f"is no slice of {slices} with {outputs} outputs"
        if isinstance(layer, Sliced) and slices != slices_of(layer):
            return _otherwise_divided(slices, slices_of(layer))
        outputs = slices.out_features
    saved = (config.in_features, outputs)
    if saved != there:
        return f"has (in_features, out_features) {saved} in the adapter and {there} in the model"
    return None


def _otherwise_divided(saved: Slices | None, own: Slices | None) -> str:
    return f"is of {saved or 'no slices'} in the adapter and of {own or 'no slices'} in the model"


def _slices_of(config: LayerConfig) -> Slices | None:
    return None if config.slices is None else Slices(groups=config.groups, **config.slices)


def _other_patch(layer: Gated, config: LayerConfig) -> str | None:
    """How a patched layer differs from how the saved one was patched."""
    saved, own = _slices_of(config), layer.slices if isinstance(layer, LinearSlice) else None
    if saved != own:
        return _otherwise_divided(saved, own)
    kind = type(layer.modification)
    if name_of(kind) != config.method:
        return f"is {config.method!r} in the adapter and {name_of(kind) or kind.__name__!r} here"
    if (layer.gate is None) != (config.penalty is None):
        gated, ungated = ("adapter", "model") if layer.gate is None else ("model", "adapter")
        return f"has a gate in the {gated} and none in the {ungated}"
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


def _on_meta(
    method: type[Modification], config: LayerConfig, weight: Tensor
) -> Modification | None:
    """The modification without memory; None if the method needs a real layer to be made."""
    dtype = trainable_dtype(weight)
    sizes = config.in_features, config.out_features
    stub = nn.Linear(*sizes, bias=False, device="meta", dtype=dtype)
    try:
        return method(stub, **config.options)
    except TokenGateError:
        raise
    except Exception:
        return None


def _fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    for key, value in values.items():
        owner, _, attribute = key.rpartition(".")
        _fill_one(module.get_submodule(owner), attribute, value)


@torch.no_grad()
def _fill_one(owner: nn.Module, attribute: str, value: Tensor) -> None:
    there = getattr(owner, attribute)
    if there.is_meta:
        new = value.to(there.dtype, copy=True)
        if isinstance(there, nn.Parameter):
            new = nn.Parameter(new, requires_grad=there.requires_grad)
        setattr(owner, attribute, new)
    else:
        there.copy_(divided_as(value.to(there.device), there))
