"""Load a saved adapter into a model, patched or not."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from tokengate.adapters.base_model import RUNNING, class_name, fingerprint, others
from tokengate.adapters.fitting import Fit
from tokengate.adapters.folder import SavedAdapter, read_adapter
from tokengate.adapters.saving import trained_beside
from tokengate.adapters.source import local
from tokengate.arguments import in_our_words
from tokengate.errors import DifferentBaseWarning, TokenGateError, listed
from tokengate.layers.changing import Skipped, all_or_nothing, exclusive
from tokengate.layers.coverage import look_anew
from tokengate.layers.folded import folded
from tokengate.layers.gated_linear import DEFAULT
from tokengate.layers.named_adapters import (
    adapter_names,
    add_adapter,
    check_name,
    reading,
)
from tokengate.layers.patched import all_layers, require_layers
from tokengate.linears.mixing import warn_of_mixing
from tokengate.names import check_module
from tokengate.patching.patch import install
from tokengate.patching.wrappers import check_can_patch, check_gathered
from tokengate.sharding import is_absent


@in_our_words(
    same={"adapter_name": "name", "adapter": "name"},
    otherwise={
        "is_trainable": "leave it out, as what is loaded is trainable, or call "
        "requires_grad_(False) on it",
        "config": "leave it out, as the folder says how to patch",
    },
)
@exclusive
def load(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    strict: bool = True,
    revision: str | None = None,
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

    With a `name` the adapter comes beside those that the model has, or in the place of the one that
    is called so; `use` puts it in use. The first one is in use at once.

    Args:
        model: the base model, or one that is patched.
        folder: what `save` was given; or `"user/name"`, where no such folder is here, for a
            repository on Hugging Face's Hub, which wants huggingface_hub.
        name: of the adapter; by default it is the one in use, or the first.
        strict: False skips the layers and parameters that do not fit this model.
        revision: a branch, tag or commit of a repository.

    Returns:
        What was skipped, and why, by the name of the layer or parameter; empty if nothing was.

    Raises:
        TokenGateError: the folder is damaged or was changed, or the repository cannot be reached;
            something of it does not fit; or ZeRO-3 has divided the layers.

    Warns:
        DifferentBaseWarning: what the adapter has fits, but the model's linear layers are not all
            those of the model it was saved from; or what was random or of the head there, and not
            trained, has other values here.
    """
    check_module("load", model)
    if name is not None:
        check_name(name)
    saved = read_adapter(local(folder, revision))
    return Skipped("load", load_saved(model, saved, "load", name=name, strict=strict))


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
    check_gathered(model, caller)
    fit = Fit(saved, strict)
    known = adapter_names(model)
    if known and (name is None or name in known):
        with reading(model, name):
            _replace(model, fit)
    else:
        warn_of_mixing(model, _add(model, fit, name or DEFAULT, caller), stacklevel=6)
    if saved.config.base_fingerprint not in ("", fingerprint(model)):
        warnings.warn(
            f"the adapter in {str(saved.folder)!r} was saved from a {saved.config.base_class}, "
            f"whose linear layers are not all those of this {class_name(model)}: make sure that "
            "it is the same base.",
            DifferentBaseWarning,
            stacklevel=5,
        )
    different = others(model, saved.config.base_values, saved.config.train)
    if moved := [name for name in different if name.endswith(RUNNING)]:
        warnings.warn(
            f"the adapter in {str(saved.folder)!r} was saved beside other values of "
            f"{listed(map(repr, moved))} than this {class_name(model)} has, as its training moved "
            "them, and no adapter has any: give the model those, which its state_dict had, or "
            "train anew with such layers in evaluation mode.",
            DifferentBaseWarning,
            stacklevel=5,
        )
    if different := [name for name in different if name not in moved]:
        warnings.warn(
            f"the adapter in {str(saved.folder)!r} was trained beside other values of "
            f"{listed(map(repr, different))}, which stayed frozen, than this {class_name(model)} "
            "has, so that it will not do here what it did: give the base the values it had, or "
            'train anew with patch(train="head"), which saves them along.',
            DifferentBaseWarning,
            stacklevel=5,
        )
    return fit.misfits


def _replace(model: nn.Module, fit: Fit) -> None:
    """New values for the adapter in use."""
    patched = require_layers(model, "load")
    for name, layer in patched.items():
        if any(map(is_absent, layer.modification.parameters())):
            raise TokenGateError(
                f"load found {name!r} divided by DeepSpeed's ZeRO-3, which has values of its own "
                "beside the model's: load the adapter before deepspeed.initialize, or before the "
                "Trainer's train()."
            )
    found = fit.patched_layers(patched)
    extras = fit.extras(model, trained_beside(model, patched))
    fit.check_any(model, [*found, *extras])
    parts = [part for m in found.values() for part in (m.modification, m.gate) if part is not None]
    written = [*extras.values(), *(t for part in parts for t in part.state_dict().values())]
    with all_or_nothing(model.modules(), written):
        for name, layer in found.items():
            fit.fill(name, layer.modification, layer.gate, fresh=False)
        fit.fill_extras(model, extras)


def _add(model: nn.Module, fit: Fit, own_name: str, caller: str) -> set[nn.Module]:
    """Another adapter, or the first; the layers that it is the first to patch."""
    check_can_patch(model, caller)
    others = all_layers(model)
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
        fit.fill(name, modification, gate, fresh=True)
    new = {name: plan for name, plan in planned.items() if name not in others}
    with all_or_nothing(model.modules(), extras.values()):
        fit.fill_extras(model, extras)
        for name in planned.keys() & others.keys():
            add_adapter(others[name], own_name, *planned[name][1:])
        if new or not others:
            asked = [{"targets": list(planned), "exclude": None, "train": list(extras)}]
            install(model, list(new.values()), extras, asked, own_name)
        patched = all_layers(model)
        look_anew()
    return {patched[name] for name in new}
