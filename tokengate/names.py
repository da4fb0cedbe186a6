"""A model's own names of its modules and parameters, whatever wraps the model or a part of it.

DistributedDataParallel, FSDP, torch.compile, activation checkpointing and averaged copies put a
module of theirs around one of the model's, and a word of theirs into all names behind it, as in
`blocks.0._orig_mod.fc`. Every name that is shown, matched or written comes from here, so that what
was said, saved or measured of a model with wrappers is true of the one without, and the reverse.

Wrappers are told by their classes, not by the words: a model may have a child called `module`.
Classes are known by name, because importing them would cost what most users do not use.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from tokengate.errors import TokenGateError

# By class: its library, and the attribute in which it holds what it wraps.
_WRAPPERS = {
    "ActivationWrapper": ("torch", "_checkpoint_wrapped_module"),
    "AveragedModel": ("torch", "module"),
    "DataParallel": ("torch", "module"),
    "DistributedDataParallel": ("torch", "module"),
    "FullyShardedDataParallel": ("torch", "_fsdp_wrapped_module"),
    "OptimizedModule": ("torch", "_orig_mod"),
    "ModelEmaV2": ("timm", "module"),
    "ModelEmaV3": ("timm", "module"),
    "DeepSpeedEngine": ("deepspeed", "module"),
}


class Holder(nn.Module):
    """A module that only holds others, and is none of the model's own.

    Args:
        named: whether its name is a part of theirs.
    """

    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.named = named


def check_module(asked: str, model: Any) -> None:
    """An error, which names the function that was called, if what it was given is no module."""
    if not isinstance(model, nn.Module):
        raise TokenGateError(f"{asked} was given a {type(model).__name__}: pass a torch.nn.Module.")


def inside(module: nn.Module) -> nn.Module:
    """What wrappers were put around: `module` itself where it is none."""
    while (held := _held(module)) is not None:
        module = held
    return module


def with_wrappers(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` under own names; a wrapper has the name of what it wraps."""
    return _walk(model, "", set() if remove_duplicate else None)


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` under own names, without wrappers."""
    for name, module in with_wrappers(model, remove_duplicate):
        if _held(module) is None:
            yield name, module


def named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its children under all their names, each without what wraps it."""
    for name, child in children(inside(module)):
        yield name, inside(child)


def named_parameters(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` under own names."""
    seen: set[nn.Parameter] = set()
    for prefix, module in named_modules(model, remove_duplicate):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in seen:
                continue
            if remove_duplicate:
                seen.add(parameter)
            yield joined(prefix, name), parameter


def submodule(model: nn.Module, name: str) -> nn.Module:
    """`model.get_submodule(name)` of an own name, without what wraps it."""
    module = inside(model)
    while name:
        found = ((n, m) for n, m in children(module) if f"{name}.".startswith(f"{n}."))
        own, child = next(found, (None, module))
        if own is None:  # an error in torch's own words
            return module.get_submodule(name)
        module, name = inside(child), name[len(own) + 1 :]
    return module


def joined(prefix: str, name: str) -> str:
    """The name of what is called `name` in the module `prefix`, "" being the model itself."""
    return f"{prefix}.{name}" if prefix else name


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its children by name, and in place of a `Holder` those of that."""
    for name, child in module._modules.items():
        if isinstance(child, Holder):
            for own, held in children(child):
                yield joined(name, own) if child.named else own, held
        elif child is not None:
            yield name, child


def _walk(
    module: nn.Module, name: str, seen: set[nn.Module] | None
) -> Iterator[tuple[str, nn.Module]]:
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    yield name, module
    held = _held(module)
    if held is not None:
        yield from _walk(held, name, seen)
        return
    for own, child in children(module):
        yield from _walk(child, joined(name, own), seen)


def _held(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None of what is none."""
    attribute = _attribute(type(module))  # type: ignore[arg-type]
    return None if attribute is None else module._modules.get(attribute)


@cache
def _attribute(kind: type[nn.Module]) -> str | None:
    for base in kind.__mro__:
        library, attribute = _WRAPPERS.get(base.__name__, ("", ""))
        if library and base.__module__.startswith(f"{library}."):
            return attribute
    return None
