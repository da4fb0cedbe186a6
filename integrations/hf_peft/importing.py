"""A plain model patched with an adapter that PEFT wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from tokengate import TokenGateError, __version__
from tokengate.adapters.config import AdapterConfig, LayerConfig
from tokengate.adapters.folder import SavedAdapter
from tokengate.adapters.loading import load_saved
from tokengate.adapters.weights import DTYPES
from tokengate.arguments import finite, in_our_words, non_negative, switch
from tokengate.integrations.hf_peft.format import held_twice, unlike_ours
from tokengate.integrations.hf_peft.names import Names
from tokengate.integrations.hf_peft.reading import PeftAdapter, read_peft
from tokengate.layers.changing import Skipped, exclusive
from tokengate.layers.named_adapters import adapter_names, check_name
from tokengate.linears.linear_like import is_linear_like
from tokengate.names import named_modules, named_parameters
from tokengate.patching.wrappers import check_can_patch
from tokengate.patterns import Pattern


@in_our_words(
    same={"adapter_name": "name"},
    otherwise={
        "is_trainable": "leave it out, as what is imported is trainable",
    },
)
@exclusive
def import_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    tau: float = 0.0,
    penalty: float = 1e-5,
    gate: bool = True,
    strict: bool = True,
    experts: Mapping[Pattern, str] | None = None,
) -> dict[str, str]:
    """Patch `model` with an adapter that PEFT's `save_pretrained` wrote into `folder`, in place.

    With tau <= 0 or `gate=False` the model computes what PEFT's does. LoRA with everything that
    sets ranks and scales (`rank_pattern`, `alpha_pattern`, `use_rslora`), DoRA, and AdaLoRA, whose
    pruned rows come back as zeros; LoRA on experts' 3-D parameters (`target_parameters`);
    `modules_to_save` become parameters that are trained along, as
    by `patch(train=...)`. What has no equal here is refused by name. Everything is checked first:
    an error leaves the model untouched.

    Args:
        model: the base model, as PEFT had it; on the meta device the base's values may come later,
            as after `tokengate.load`.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        name: of the adapter, which comes beside those that the model has; without one, the model
            has none.
        tau: of every layer, as in `patch`; so are `penalty` and `gate`.
        penalty: lambda of eq. 15.
        gate: False for the plain method.
        strict: False skips the layers and parameters that do not fit this model.
        experts: how experts' parameters are laid out that the library does not know, as in `patch`.

    Returns:
        What was skipped, and why, by the name of the layer or parameter; empty if nothing was.

    Raises:
        TokenGateError: the folder is damaged, has what has no equal here, or does not fit.
    """
    finite("tau", tau)
    non_negative("penalty", penalty)
    switch("gate", gate)
    check_can_patch(model, "import_peft")
    known = adapter_names(model)
    if name is not None:
        check_name(name)
    if known and (name is None or name in known):
        taken = "" if name is None else f", where {name!r} is the name of another adapter"
        raise TokenGateError(
            f"import_peft was given a {type(model).__name__} that is patched already{taken}: pass "
            "a name of its own, name=..., for one more adapter, call tokengate.unpatch(model) "
            "first, or pass a new one."
        )
    adapter = read_peft(folder, model, experts)
    missing = _missing(model, adapter)
    if strict and missing:
        first, reason = next(iter(missing.items()))
        raise TokenGateError(
            f"the adapter in {str(folder)!r} does not fit: {first!r} {reason}; pass the model "
            "it was saved from, or strict=False to skip what does not fit."
        )
    saved = _as_saved(adapter, folder, tau, penalty if gate else None, leave_out=missing)
    skipped = load_saved(model, saved, "import_peft", name=name, strict=strict)
    return Skipped("import_peft", missing | skipped)


def read_saved(folder: str | Path) -> SavedAdapter:
    """PEFT's adapter in `folder` as if `tokengate.save` had written it, without gates.

    Raises:
        TokenGateError: the folder is damaged, or has what has no equal here.
    """
    adapter = read_peft(folder)
    for name, dtype in adapter.unread.items():
        raise TokenGateError(
            f"the adapter in {str(folder)!r} has {name!r} as {dtype}, and the values of an adapter "
            f"are {', '.join(DTYPES)}: save it again without that buffer."
        )
    return _as_saved(adapter, folder, 0.0, None)


def _as_saved(
    adapter: PeftAdapter,
    folder: str | Path,
    tau: float,
    penalty: float | None,
    leave_out: Collection[str] = (),
) -> SavedAdapter:
    tensors = {name: value for name, value in adapter.heads.items() if name not in leave_out}
    trained = list(tensors)
    described = {}
    for name, parameters in adapter.parameters.items():
        if name in leave_out:
            continue
        tensors |= {f"{name}.modification.{part}": value for part, value in parameters.items()}
        if penalty is not None:
            count = len(parameters["A"]) if name in adapter.experts else 1
            tensors[f"{name}.gate.tau"] = torch.full((count,), float(tau))
        down, up = ("Q", "P") if adapter.method == "adalora" else ("A", "B")
        described[name] = LayerConfig(
            method=adapter.method,
            options=adapter.options[name],
            in_features=parameters[down].shape[-1],
            out_features=parameters[up].shape[-2],
            axes=adapter.experts[name].stack.axes if name in adapter.experts else None,
            penalty=None if penalty is None else float(penalty),
            gate=None if penalty is None else "threshold",
        )
    kinds = (adapter.config.get(f"target_{kind}") for kind in ("modules", "parameters"))
    exclude = adapter.config.get("exclude_modules")
    config = AdapterConfig(
        tokengate_version=__version__,
        base_class=adapter.config.get("base_model_name_or_path") or "",
        base_fingerprint="",  # PEFT does not say
        layers=described,
        tensors={},
        targets=[{"targets": own, "exclude": exclude, "train": trained} for own in kinds if own],
        train=trained,
    )
    return SavedAdapter(Path(folder), config, tensors)


def _missing(model: nn.Module, adapter: PeftAdapter) -> dict[str, str]:
    """What PEFT would look for in the adapter, or change in the model, and could not here."""
    twice = "is held by several modules of the model, of which PEFT adapts it for the first alone"
    found = dict.fromkeys(held_twice(model, adapter.parameters), twice)
    found |= adapter.unfit
    names = Names(adapter.config)
    for name, module in named_modules(model):
        if not is_linear_like(module) or not names.is_target(name):
            continue
        if name not in adapter.parameters:
            found[name] = "is one of its target_modules, and the adapter has no values for it"
        elif (reason := unlike_ours(module, adapter.method)) is not None:
            found[name] = reason
    for owner, module in named_modules(model, remove_duplicate=False):
        for key in module.state_dict() if names.is_saved_whole([owner]) else ():
            if f"{owner}.{key}" not in adapter.heads and f"{owner}.{key}" not in adapter.unread:
                found[f"{owner}.{key}"] = "is in its modules_to_save, and has no values there"
    shared = Counter(id(p) for _, p in named_parameters(model, remove_duplicate=False))
    parameters = dict(named_parameters(model, remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, dtype in adapter.unread.items():
        found[name] = f"is {dtype} in the adapter, and only floating-point values are read"
    for name in [*adapter.heads, *adapter.unread]:
        if name in parameters and shared[id(parameters[name])] > 1:
            found[name] = (
                "is tied to another parameter in the model, which PEFT would not change along; "
                "untie them first (tie_word_embeddings=False)"
            )
        elif name in buffers:
            found[name] = "is a buffer in the model, which has no place beside trained parameters"
    return found
