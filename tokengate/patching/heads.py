"""A model's head, and whatever else no checkpoint gave values: random, another one in each load.

An adapter that is trained around frozen random numbers is worth nothing beside others. transformers
marks each parameter that `from_pretrained` found; what lacks the mark beside some that have it is
new. Other libraries' heads are known by where they are. Libraries are known by name, because
importing them would cost what most do not use.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tokengate.errors import FrozenHeadWarning, listed
from tokengate.layers.patched import all_layers, own_parameters
from tokengate.linears.by_name import is_from
from tokengate.names import inside, joined, named_children, named_modules, named_parameters

# On each parameter that transformers' from_pretrained found in the checkpoint.
_LOADED = "_is_hf_initialized"
# On a model that was given to `patch`: the names of what was new. Marks get lost, as by sharding.
_NEW = "_tokengate_new"
# Modules of libraries that load their models themselves and do not say what they found.
_OPEN_CLIP, _TIMM, _TORCHVISION = "open_clip.", "timm.models.", "torchvision.models."
_SENTENCES = "sentence_transformers."
_SILENT = (_OPEN_CLIP, _TIMM, _TORCHVISION, _SENTENCES, "diffusers.", "peft.")
# Where torchvision's models have their classifier, in the order of looking.
_CLASSIFIERS = ("heads", "head", "classifier", "fc")


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `from_pretrained` found no values for, by name.

    Those of models that it loaded, and what the user's own classes have put around such a model.
    Of a model made from its configuration all is new, and nothing is said of it. What patching has
    added is left out, as is what has no values here (on the meta device) or is no floating-point
    number.
    """
    remembered = {
        joined(prefix, name)
        for prefix, module in named_modules(model)
        for name in module.__dict__.get(_NEW, ())
    }
    ids = set()
    if any(map(_is_loaded, model.parameters())):
        ids = {id(p) for p in _unmarked(inside(model), "", "own", set())}
    own = own_parameters(all_layers(model).values())
    return {
        name: p
        for name, p in named_parameters(model)
        if (id(p) in ids or name in remembered)
        and id(p) not in own
        and p.is_floating_point()
        and not p.is_meta
    }


def head(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's head by name: what is new, or else what lies where heads lie.

    That is, in a model of transformers, what is outside the base model and not tied to a part of
    it; in one of timm or torchvision the classifier; in the user's own class what stands around
    one of these, or else that one's head. Empty where no head is known.
    """
    if found := new_parameters(model):
        return found
    own = own_parameters(all_layers(model).values())
    ids = {id(p) for p in _by_place(inside(model))} - own
    return {name: p for name, p in named_parameters(model) if id(p) in ids}


def remember_new(model: nn.Module) -> None:
    """Whatever becomes of the marks, `new_parameters` will say the same of the model."""
    model.__dict__[_NEW] = sorted(new_parameters(model))


def forget_new(model: nn.Module) -> None:
    """Take back what `remember_new` did."""
    model.__dict__.pop(_NEW, None)


def warn_of_frozen(model: nn.Module) -> None:
    """Warn of what is new and stays frozen, at the line that called `patch`."""
    frozen = [name for name, p in new_parameters(model).items() if not p.requires_grad]
    if frozen:
        warnings.warn(
            f"patch leaves {listed(map(repr, frozen))} of this {type(inside(model)).__name__} "
            "frozen, for which from_pretrained found no values: they are random, and another load "
            'of the base has others, to which the adapter will not fit, so pass train="head", '
            "which trains and saves all that is new, unless you have given them values yourself.",
            FrozenHeadWarning,
            stacklevel=4,
        )


def _unmarked(
    module: nn.Module, name: str, kind: str, seen: set[nn.Module], ignored: str = ""
) -> Iterator[nn.Parameter]:
    """What is new in a module of a part that is "own", "loaded" by transformers, or "silent".

    Args:
        module: looked through, unless it is among the `seen`.
        name: of the module, within the model of transformers that it is a part of.
        kind: of what it is a part of.
        seen: what was looked through before, to which it is added.
        ignored: a regular expression for the names that transformers itself does not miss.
    """
    if module in seen:
        return
    seen.add(module)
    if kind != "loaded" and _is_pretrained(module):
        marked = any(map(_is_loaded, module.parameters()))
        kind, name = "loaded" if marked else "silent", ""
        ignored = "|".join(getattr(module, "_keys_to_ignore_on_load_missing", None) or ())
    elif kind == "own" and _is_of(module, *_SILENT):
        kind = "silent"
    for key, parameter in module._parameters.items():
        if parameter is None or kind == "silent" or _is_loaded(parameter):
            continue
        if type(parameter.data) is not torch.Tensor:  # quantised or divided since it was loaded
            continue
        if not (ignored and re.search(ignored, joined(name, key))):
            yield parameter
    for key, child in named_children(module):
        yield from _unmarked(child, joined(name, key), kind, seen, ignored)


def _by_place(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the head by where it lies."""
    if _is_of(model, _TIMM):
        ask: Any = getattr(model, "get_classifier", tuple)
        found = ask()
        parts = found if isinstance(found, tuple) else (found,)
        return [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
    if _is_of(model, _TORCHVISION):
        children = dict(named_children(model))
        part = next((children[name] for name in _CLASSIFIERS if name in children), None)
        return [] if part is None else list(part.parameters())
    if _is_pretrained(model):
        base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
        return [] if base is None else _outside(model, [base])
    if _is_of(model, *_SILENT) and not _is_of(model, _SENTENCES):
        return []
    backbones = _backbones(model)
    around = _outside(model, backbones) if backbones else []
    return around or [p for each in backbones for p in _by_place(each)]


def _outside(model: nn.Module, parts: list[nn.Module]) -> list[nn.Parameter]:
    within = {id(p) for part in parts for p in part.parameters()}
    return [p for p in model.parameters() if id(p) not in within]


def _backbones(module: nn.Module) -> list[nn.Module]:
    """The outermost models of other libraries in a module."""
    found = []
    for _, child in named_children(module):
        whole = _is_pretrained(child) or _is_of(child, _OPEN_CLIP, _TIMM, _TORCHVISION)
        found += [child] if whole else _backbones(child)
    return found


def _is_loaded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, _LOADED, False))


def _is_pretrained(module: nn.Module) -> bool:
    return is_from(module, "transformers", "PreTrainedModel")


def _is_of(module: nn.Module, *libraries: str) -> bool:
    return any(kind.__module__.startswith(libraries) for kind in type(module).__mro__)
