"""Several adapters on one model, by name: which layers have them, and who has them in use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.gates.base import Gate
from tokengate.layers.calls import (
    USE,
    Context,
    contexts,
    in_context,
)
from tokengate.layers.gated_linear import DEFAULT, Gated
from tokengate.layers.patched import all_layers
from tokengate.methods.base import Modification

# Who has in use what is so for good.
MODEL = "model"


class Adapter(nn.Module):
    """One layer's part of a named adapter."""

    def __init__(self, modification: Modification, gate: Gate | None) -> None:
        super().__init__()
        self.modification, self.gate = modification, gate
        # Who has it in use: the model itself, and contexts of any thread.
        self.users: set[object] = set()
        # Whether a context that it was last used in may have been left before its backward.
        self.awaited = False
        # Where it has what is trained while it is in use; otherwise nothing is. Not the parameters
        # themselves, in whose place others may come: by sharding, or load_state_dict(assign=True).
        self.trained: list[tuple[nn.Module, str]] = []

    def put_in_use(self, user: object) -> None:
        """By one more, which trains what is remembered of it."""
        self.users.add(user)
        self.__dict__["awaited"] = False
        self._set_trained(True)

    def put_away(self, user: object, awaited: bool = False) -> None:
        """By one, after the last of whom nothing of it is trained, but for what is `awaited`."""
        if self.users == {user}:
            # Past nn.Module's own ways, which would take longer than all the rest of a switch.
            self.__dict__["trained"] = [
                (module, name) for module, name, p in _parameters(self) if p.requires_grad
            ]
            self.__dict__["awaited"] = awaited
        self.users.discard(user)
        self.settle()

    def settle(self) -> None:
        """Whatever was interrupted: nothing is trained of what nobody has in use."""
        if not self.users and not self.awaited:
            self._set_trained(False)

    def _set_trained(self, trained: bool) -> None:
        for module, name in self.trained:
            cast(nn.Parameter, module._parameters[name]).requires_grad_(trained)

    def __getstate__(self) -> dict[str, Any]:
        # Contexts are of the original, and so is a backward to come.
        return {**self.__dict__, "users": self.users & {MODEL}, "awaited": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        trained = [(module, name) for module, name, p in _parameters(self) if p.requires_grad]
        if trained and not self.users:  # a copy of one that a context had in use
            self.__dict__["trained"] = trained
            self.settle()


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    yield from ((module, name, p) for name, p in module._parameters.items() if p is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)


def hold(layer: Gated, names: Iterable[str | None], context: Context) -> None:
    """A context has these adapters of a layer in use."""
    for name in names:
        adapter = (layer._adapters or {}).get(cast(str, name))
        if adapter is not None:
            adapter.put_in_use(context)


def let_go(context: Context | None) -> None:
    """It has them no longer."""
    if context is None:
        return
    for layer in context.layers:
        if isinstance(layer, Gated):  # neither unpatched nor folded meanwhile
            for adapter in (layer._adapters or {}).values():
                if context in adapter.users:
                    adapter.put_away(context, context.derived)
                else:
                    adapter.settle()


@contextlib.contextmanager
def reading(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within this context `layers` and what asks them sees another adapter; None: the one in use.

    Raises:
        TokenGateError: the model has no adapter of that name.
    """
    if name is None:
        yield
        return
    patched, known = all_layers(model), adapter_names(model)
    if known and name not in known:
        raise TokenGateError(
            f"{name!r} is not among the model's adapters, {', '.join(map(repr, known))}: pass one "
            "of these."
        )
    with in_context(USE, dict.fromkeys(patched.values(), name)):
        yield


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of `model`."""
    return names_of(all_layers(model).values())


def names_of(layers: Iterable[Gated]) -> list[str]:
    """The names of all adapters of these layers."""
    return sorted({name for layer in layers for name in layer._adapters or (DEFAULT,)})


def adapters_of(layer: Gated) -> dict[str, Any]:
    """A layer's adapters by name, which can be added to."""
    if layer._adapters is None:
        # The place for those out of use first: whoever is interrupted between the two begins anew.
        layer.register_module("adapters", nn.ModuleDict())
        own = Adapter(*cast(Any, layer.adapter(DEFAULT)))
        own.users.add(MODEL)
        layer._adapters = {DEFAULT: own}
    return layer._adapters


def add_adapter(layer: Gated, name: str, modification: Modification, gate: Gate | None) -> None:
    """Give a patched layer another adapter, out of use."""
    adapter = Adapter(modification, gate).train(layer.training)
    adapter.users.add(MODEL)
    adapter.put_away(MODEL)
    adapters_of(layer)[name] = adapter
    cast(nn.ModuleDict, layer.adapters).add_module(name, adapter)


def check_can_remove(model: nn.Module, name: str) -> None:
    """An error if `name` is not an adapter that `model` can do without at present."""
    known = adapter_names(model)
    if name not in known:
        raise TokenGateError(
            f"unpatch was given name={brief(name)}, and the model's adapters are "
            f"{', '.join(map(repr, known)) or 'none'}: pass one of these."
        )
    if known == [name]:
        raise TokenGateError(
            f"unpatch was given name={name!r}, and the model has no other adapter: call "
            "tokengate.unpatch(model), which gives the base model back."
        )
    for path, layer in all_layers(model).items():
        adapter = (layer._adapters or {}).get(name)
        if layer._in_use == name or (adapter is not None and adapter.users):
            raise TokenGateError(
                f"unpatch was given name={name!r}, which is in use: put another one in use first, "
                "tokengate.use(model, another), or leave the context."
            )
        if adapter is not None and adapter.gate is not None and adapter.gate.is_led:
            raise TokenGateError(
                f"unpatch was given name={name!r}, and a SparsitySchedule leads its gate of "
                f"{path!r}: call the schedule's detach() first."
            )


def remove_adapter(layer: Gated, name: str) -> bool:
    """Take an adapter out of a layer; whether it has another one left."""
    adapters = adapters_of(layer)
    resting = cast(nn.ModuleDict, layer.adapters)._modules
    if adapters.pop(name, None) is not None and resting.pop(name, None) is None and adapters:
        # The first one stands in the layer itself, and now the next one is that.
        following, adapter = next(iter(adapters.items()))
        del resting[following]
        for part in ("modification", "gate"):
            layer._modules[part] = getattr(adapter, part)
    return bool(adapters)


def current_name(model: nn.Module) -> str:
    """What new layers' adapter is to be called: as the one in use."""
    names = {layer.in_use() for layer in all_layers(model).values()} or {DEFAULT}
    if None in names:
        raise TokenGateError(
            "patch was asked of a model none of whose adapters is in use: call "
            "tokengate.use(model, name) first, with the one that is to have the new layers."
        )
    return cast(str, next(iter(names)))


def join(layer: Gated, name: str, others: Iterable[Gated]) -> None:
    """Call the adapter of a layer that was just patched by `name`, beside those of `others`."""
    if name != DEFAULT:
        adapters = adapters_of(layer)
        adapters[name] = adapters.pop(DEFAULT)
        layer._in_use = name
    other = next(iter(others), None)
    if other is None:
        return
    put_in_use(layer, other._in_use)
    for context in contexts():
        if context.kind == USE and other in context.layers:
            cast(dict[nn.Module, Any], context.layers)[layer] = context.layers[other]
            hold(layer, [name], context)


def check_name(name: Any) -> None:
    """An error if no adapter can be called so."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise TokenGateError(
            f"name={brief(name)} cannot be an adapter's: pass a word that is no method of a module "
            'and has no dot, e.g. name="french".'
        )


def put_in_use(layer: Gated, name: str | None, instead_of: str | None = None) -> None:
    """One layer's part of `use` for good; a layer that `name` does not modify is then plain."""
    before = layer._in_use if instead_of is None else instead_of
    if name == before:
        return
    adapters = adapters_of(layer)
    new, old = (adapters.get(cast(str, each)) for each in (name, before))
    if new is not None:
        new.put_in_use(MODEL)
    layer.__dict__["_in_use"] = name
    if old is not None:
        old.put_away(MODEL)
