"""Which layers of a model are patched, and which were and are there no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from tokengate.errors import TokenGateError, brief, listed
from tokengate.gates.deciding import Observer
from tokengate.layers.experts.gated_experts import GatedExperts
from tokengate.layers.gated_linear import Gated
from tokengate.linears.experts import is_expert
from tokengate.names import named_modules


def layers(model: nn.Module) -> dict[str, Gated]:
    """The patched layers of `model` by name, in the model's order; a shared layer once.

    Names are the model's own, whatever wraps it or a part of it.
    """
    return {n: m for n, m in all_layers(model).items() if m.modification is not None}


def module_names(name: str, layer: Gated) -> list[str]:
    """What reports call a layer: by its name, or each of its experts by one of its own."""
    return layer.names_of_experts(name) if isinstance(layer, GatedExperts) else [name]


def may_be_idle(name: str, layer: nn.Module) -> bool:
    """Whether a forward may leave a layer out: an expert's own, which may be given no token."""
    return is_expert(name) and not isinstance(layer, GatedExperts)


def observers(
    patched: Mapping[str, Gated], make: Callable[[str], Observer]
) -> dict[nn.Module, Observer]:
    """For `in_context(RECORD, ...)`: who is told of each layer, and of each of its experts."""
    found: dict[nn.Module, Observer] = {}
    for name, layer in patched.items():
        each = [make(own) for own in module_names(name, layer)]
        several = isinstance(layer, GatedExperts)
        found[layer] = replace(each[0], experts=each.__getitem__) if several else each[0]
    return found


def own_by_id(patched: Iterable[Any]) -> dict[int, nn.Parameter]:
    """What modifications and gates have, of all adapters of patched or folded layers."""
    parts = (part for layer in patched for part in layer.all_parts())
    return {id(p): p for part in parts if part is not None for p in part.parameters()}


def own_parameters(patched: Iterable[Any]) -> set[int]:
    """The ids of the same."""
    return set(own_by_id(patched))


def all_layers(model: nn.Module) -> dict[str, Gated]:
    """Those, too, that the adapter in use does not modify."""
    if not isinstance(model, nn.Module):
        raise TokenGateError(f"{brief(model)} has no layers: pass a torch.nn.Module.")
    return {name: m for name, m in named_modules(model) if isinstance(m, Gated)}


def require_layers(model: nn.Module, asked: str) -> dict[str, Gated]:
    """`layers(model)`; an error that names the function `asked` if there is none."""
    patched = layers(model)
    if not patched and all_layers(model):
        raise TokenGateError(
            f"{asked} was asked of a model none of whose adapters is in use: call "
            "tokengate.use(model, name) first."
        )
    if not patched:
        raise TokenGateError(
            f"{asked} was asked of a {type(model).__name__} without a patched layer: call "
            "tokengate.patch(model, targets=...) first, and pass that model."
        )
    return patched


# On a model that was given to `patch`: {name of a layer: whether it is folded, and so plain}.
_REMEMBERED = "_tokengate_patched"
# On one some of whose layers are gone: those that its user was told of.
NAMED = "_tokengate_lost"
# On each module that is followed: whether its first forward was looked at.
SEEN = "_tokengate_seen"
# All of these models.
ROOTS: WeakSet[nn.Module] = WeakSet()


def remember(model: nn.Module) -> None:
    """From now on these are the layers that `model` should have patched."""
    remembered = model.__dict__.setdefault(_REMEMBERED, {})
    for name in all_layers(model):
        remembered.setdefault(name, False)
    ROOTS.add(model)
    _KNOWN.clear()


def forget(model: nn.Module) -> None:
    """`unpatch` is about to take the layers of `model` back: no model misses them."""
    for remembered, name in _where(model, all_layers(model).values()):
        remembered.pop(name, None)
    for root in roots(model):
        for key in (_REMEMBERED, NAMED):
            root.__dict__.pop(key, None)
        ROOTS.discard(root)
    _KNOWN.clear()


def rest(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """`fold` is about to make these layers of `model` plain: no model misses them meanwhile."""
    for remembered, name in _where(model, layers):
        remembered[name] = True


def rise(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """They are patched again."""
    for remembered, name in _where(model, layers):
        remembered[name] = False


def forget_plain(model: nn.Module) -> None:
    """What is plain of `model` stays so: no model waits for it."""
    for root in roots(model):
        remembered: dict[str, bool] = root.__dict__[_REMEMBERED]
        for name in [name for name, is_plain in remembered.items() if is_plain]:
            del remembered[name]
    _KNOWN.clear()


def _where(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[tuple[dict[str, bool], str]]:
    """What models remember of these layers, and the layers' names there."""
    wanted = set(layers)
    _KNOWN.clear()
    for root in {*roots(model), *ROOTS}:
        remembered = root.__dict__.get(_REMEMBERED, {})
        for name, layer in all_layers(root).items():
            if layer in wanted and name in remembered:
                yield remembered, name


def roots(model: nn.Module) -> list[nn.Module]:
    """The modules in `model`, itself included, that remember their layers."""
    return [module for module in model.modules() if is_root(module)]


def is_root(module: nn.Module) -> bool:
    """Whether `module` was given to `patch`, and remembers its layers."""
    return _REMEMBERED in module.__dict__


def lost(model: nn.Module) -> list[str]:
    """The layers of `model` that were patched, and that neither `unpatch` nor `fold` took back."""
    known = _KNOWN.get(model)
    if known is None or not all(map(_holds, known.ways)):
        for _, _, child, _ in [] if known is None else filter(_is_beside_others, known.ways):
            # Its owner may call these in its place, as a fused projection.
            child._reached = False
            model.__dict__[SEEN] = False
        known = _KNOWN[model] = _look(model)
    return known.lost


def _holds(way: _Way) -> bool:
    held, key, child, count = way
    return held.get(key) is child and len(held) == count


def _is_beside_others(way: _Way) -> bool:
    held, key, child, count = way
    return held.get(key) is child and len(held) > count and isinstance(child, Gated)


# The children of a module, the name of one of them, it, and how many they are.
_Way = tuple[dict[str, Any], str, Any, int]


@dataclass
class _Found:
    ways: list[_Way]  # from the model to its layers
    lost: list[str]


# What was found last, while none of the ways has changed.
_KNOWN: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def _look(model: nn.Module) -> _Found:
    remembered: dict[str, bool] = model.__dict__.get(_REMEMBERED, {})
    here = {layer: path for path, layer in model.named_modules() if isinstance(layer, Gated)}
    found = {name: here[layer] for name, layer in all_layers(model).items()}
    ways: dict[str, _Way] = {}
    for name in remembered.keys() & found.keys():
        parent, path = model, ""
        for component in found[name].split(".") if found[name] else ():
            path = f"{path}.{component}"
            child = parent._modules[component]
            assert child is not None
            ways[path] = (parent._modules, component, child, len(parent._modules))
            parent = child
    missing = [name for name, is_plain in remembered.items() if not is_plain and name not in found]
    return _Found(list(ways.values()), missing)


def what_is_lost(model: nn.Module) -> str | None:
    """In words, with what to do; None if nothing is."""
    names = lost(model)
    if not names:
        return None
    kinds = {type(_at(model, name)).__name__ for name in names} - {"NoneType"}
    now = f"a {' or a '.join(sorted(kinds))} stands there" if kinds else "nothing stands there"
    were = "was" if len(names) == 1 else "were"
    return (
        f"{listed(map(repr, names))} of this {type(model).__name__} {were} "
        f"patched, and {now} now, unpatched: whatever replaced it (resize_token_embeddings, "
        "reset_classifier, dequantize, a conversion or fusion of layers) belongs before "
        "tokengate.patch, so patch what is there now, and make the optimizer anew"
    )


def _at(model: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = model
    for component in path.split(".") if path else ():
        found = None if found is None else found._modules.get(component)
    return found
