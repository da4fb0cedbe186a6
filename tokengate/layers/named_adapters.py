"""Several adapters on one model, one of them in use, or one for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.gates.base import Gate
from tokengate.layers.folded import is_folded
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import all_layers
from tokengate.layers.regions import Region, Regional, valid_where
from tokengate.layers.rows import Rows
from tokengate.linears.experts import is_expert
from tokengate.methods.base import Modification

#: The name of what `patch` adds, and `load` where it is not told another.
DEFAULT = "default"


class Adapter(nn.Module):
    """One layer's part of a named adapter."""

    def __init__(self, modification: Modification, gate: Gate | None) -> None:
        super().__init__()
        self.modification, self.gate = modification, gate
        # Where it has what is trained while it is in use; otherwise nothing is. Not the parameters
        # themselves, in whose place others may come: by sharding, or load_state_dict(assign=True).
        self.trained: list[tuple[nn.Module, str]] = []

    def note_trained(self) -> None:
        """Remember what of it is trained."""
        # Past nn.Module's own ways, which would take longer than all the rest of a switch.
        self.__dict__["trained"] = [
            (module, name) for module, name, p in _parameters(self) if p.requires_grad
        ]

    def set_trained(self, trained: bool) -> None:
        """Train what is remembered, or nothing."""
        for module, name in self.trained:
            cast(nn.Parameter, module._parameters[name]).requires_grad_(trained)


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    yield from ((module, name, p) for name, p in module._parameters.items() if p is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)


class use:
    """Put another adapter of `model` in use, for good or within a context:

        tokengate.load(model, "french", name="french")
        tokengate.use(model, "french")                  # from here on
        with tokengate.use(model, None): ...            # the base model, here
        with tokengate.use(model, ["french", None]):    # the first row's adapter, the second's base
            model(two_rows)
        with tokengate.use(model, {"cat": left, "dog": right}):     # each at its own positions
            model(picture)

    Nothing is copied or made: the modules that were loaded change places. What is not in use is not
    trained, and no part of `layers`, `param_groups`, `save` and the rest; it is in the model's
    `state_dict`, under `adapters`. For rows of several adapters the base layer computes all rows at
    once, and each adapter its own. `backward` belongs inside the context, too, where activations
    are computed again. A copy of the model has no rows.

    Args:
        model: a patched model.
        name: of an adapter, "default" for what `patch` added; None for none of them; a sequence
            of these, one for each row of every batch; or a dict from adapters to regions, each a
            mask, function or `after` as in `restrict`: where regions overlap, all are added, and
            each gate compares its own with the base layer's output.

    Raises:
        TokenGateError: no layer is patched; the model is folded; it has no adapter of that name.
            With rows, in a forward: the batch has another number of them.
    """

    def __init__(
        self, model: nn.Module, name: str | Sequence[str | None] | Mapping[str, Any] | None
    ) -> None:
        modules = list(_without_parts_of_layers(model, set()))
        self._layers = [module for module in modules if isinstance(module, Gated)]
        known = _names_of(self._layers)
        if not known:
            raise TokenGateError(
                f"use was asked of a {type(model).__name__} without a patched layer: call "
                "tokengate.patch or tokengate.load first."
            )
        if any(is_folded(module) for module in modules):
            raise TokenGateError(
                "use was asked of a model that is folded: call the folding's undo() first."
            )
        rows = None if name is None or isinstance(name, str) else list(name)
        if rows == []:
            raise TokenGateError("use was given no names: pass one, or None, for each row.")
        for each in [name] if rows is None else rows:
            if each is not None and each not in known:
                raise TokenGateError(
                    f"use was given {brief(each)}, and the model's adapters are "
                    f"{', '.join(map(repr, known))}: pass one of these, or None for the base model."
                )
        if rows is not None or isinstance(name, Mapping):
            routed = next(filter(is_expert, all_layers(model)), None)
            if routed is not None:
                raise TokenGateError(
                    f"use was given one name for each row, and {routed!r} is an expert's, which "
                    "sees positions without their rows: pass one name for all."
                )
        self._before = [(layer, layer._in_use, layer._rows) for layer in self._layers]
        shared: Rows | Regional | None = None if rows is None else Rows(rows)
        if isinstance(name, Mapping):
            regions = {n: Region(valid_where("use", w), True).anew() for n, w in name.items()}
            places: dict[nn.Module, str] = {m: n for n, m in all_layers(model).items()}
            shared = Regional(places, regions)
        try:
            for layer in self._layers:
                put_in_use(layer, layer._in_use if rows is not None else name, shared)  # type: ignore[arg-type]
        except BaseException:  # an interruption, after which layers would be of two adapters
            self._give_back()
            raise

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._give_back()
        except BaseException:  # an interruption; the context is left all the same
            self._give_back()
            raise

    def _give_back(self) -> None:
        for layer, name, rows in self._before:
            if isinstance(layer, Gated):  # neither unpatched nor folded meanwhile
                put_in_use(layer, name, rows)


def _without_parts_of_layers(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    """`module.modules()` but for what is in patched layers, which would be most of it."""
    if module in seen:
        return
    seen.add(module)
    yield module
    if not isinstance(module, Gated):
        for child in module._modules.values():
            if child is not None:
                yield from _without_parts_of_layers(child, seen)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of `model`."""
    return _names_of(all_layers(model).values())


def _names_of(layers: Iterable[Gated]) -> list[str]:
    return sorted({name for layer in layers for name in layer._adapters or (DEFAULT,)})


def adapters_of(layer: Gated) -> dict[str, Any]:
    """A layer's adapters by name, which can be added to."""
    if layer._adapters is None:
        # The place for those out of use first: whoever is interrupted between the two begins anew.
        layer.register_module("adapters", nn.ModuleDict())
        layer._adapters = {DEFAULT: Adapter(layer.modification, layer.gate)}
    return layer._adapters


def add_adapter(layer: Gated, name: str, modification: Modification, gate: Gate | None) -> None:
    """Give a patched layer another adapter, out of use."""
    adapter = Adapter(modification, gate).train(layer.training)
    adapter.note_trained()
    adapter.set_trained(False)
    adapters_of(layer)[name] = adapter
    cast(nn.ModuleDict, layer.adapters).add_module(name, adapter)


def current_name(model: nn.Module) -> str:
    """What new layers' adapter is to be called: as the one in use."""
    names = {layer._in_use for layer in all_layers(model).values()} or {DEFAULT}
    if None in names:
        raise TokenGateError(
            "patch was asked of a model none of whose adapters is in use: call "
            "tokengate.use(model, name) first, with the one that is to have the new layers."
        )
    return cast(str, next(iter(names)))


def rename(layer: Gated, name: str) -> None:
    """Call the adapter of a layer that was just patched by `name`."""
    if name != DEFAULT:
        adapters = adapters_of(layer)
        adapters[name] = adapters.pop(DEFAULT)
        layer._in_use = name


def check_name(name: Any) -> None:
    """An error if no adapter can be called so."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise TokenGateError(
            f"name={brief(name)} cannot be an adapter's: pass a word that is no method of a module "
            'and has no dot, e.g. name="french".'
        )


def put_in_use(layer: Gated, name: str | None, rows: Rows | Regional | None = None) -> None:
    """One layer's part of `use`; a layer that `name` does not modify is then plain."""
    if rows is not None or layer._rows is not None:
        adapters_of(layer)
        layer.__dict__.pop("_rows", None)
        if rows is not None:
            layer._rows = rows
    if name == layer._in_use:
        return
    adapters = adapters_of(layer)
    # Straight into the tables: assignment to a module looks at every attribute it has.
    modules: Any = layer._modules
    resting: Any = modules["adapters"]._modules
    before, after = (adapters.get(each) for each in (cast(str, layer._in_use), cast(str, name)))
    tables = [(table, table.copy()) for table in (modules, resting)]
    if before is not None:
        before.note_trained()
    try:
        if before is not None:
            before.set_trained(False)
            resting[layer._in_use] = before
        if after is not None:
            after.set_trained(True)
            del resting[name]
        modules["modification"] = None if after is None else after.modification
        modules["gate"] = None if after is None else after.gate
        layer.__dict__["_in_use"] = name
    except BaseException:  # an interruption; `all_or_nothing` would take as long as all the rest
        for table, content in tables:
            table.clear()
            table.update(content)
        for adapter, trained in ((before, True), (after, False)):
            if adapter is not None:
                adapter.set_trained(trained)
        raise
