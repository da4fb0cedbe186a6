"""Another adapter in use: within a context, or for good; one, or one for each row or region."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast
from weakref import WeakValueDictionary

from torch import nn

from tokengate.errors import TokenGateError, brief
from tokengate.layers.calls import USE, contexts, enter, leave
from tokengate.layers.changing import busy_elsewhere, count_change
from tokengate.layers.experts.gated_experts import GatedExperts
from tokengate.layers.folded import is_folded
from tokengate.layers.gated_linear import Gated
from tokengate.layers.named_adapters import hold, let_go, names_of, put_in_use
from tokengate.layers.patched import all_layers, may_be_idle
from tokengate.layers.regions import Region, Regional, RowsRegion, valid_where
from tokengate.layers.several import Rows


class use:
    """Put another adapter of `model` in use, for good or within a context:

        tokengate.load(model, "french", name="french")
        tokengate.use(model, "french")                  # from here on
        with tokengate.use(model, None): ...            # the base model, here
        with tokengate.use(model, ["french", None]):    # the first row's adapter, the second's base
            model(two_rows)
        with tokengate.use(model, {"cat": left, "dog": right}):     # each at its own positions
            model(picture)

    Nothing is copied, made or moved. A context belongs to this thread or task: other ones run as
    they did, with what is in use for good or in contexts of their own. For good is what was never
    entered as a context: it holds here at once, and for all threads once nobody holds the object,
    which in the form above is at once, too; do that while no other thread runs the model.

    What is in use nowhere is not trained, but that the backward of what ran in a context may come
    after it, if that is not compiled; what is not in use here is no part of `layers`,
    `param_groups`, `save` and the rest; it is in the model's `state_dict`, under `adapters`. For
    rows of several adapters the base layer computes all rows at once, and each adapter its own.
    Compiled code is compiled anew for each adapter in use.

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

    # Until it is entered as a context, or in use for good.
    _pending = False

    def __init__(
        self, model: nn.Module, name: str | Sequence[str | None] | Mapping[str, Any] | None
    ) -> None:
        modules = list(_without_parts_of_layers(model, set()))
        self._layers = [module for module in modules if isinstance(module, Gated)]
        known = names_of(self._layers)
        if not known:
            raise TokenGateError(
                f"use was asked of a {type(model).__name__} without a patched layer: call "
                "tokengate.patch or tokengate.load first."
            )
        if any(is_folded(module) for module in modules):
            raise TokenGateError(
                "use was asked of a model that is folded: call the folding's undo() first."
            )
        several = isinstance(name, Iterable) and not isinstance(name, str)
        self._names: list[Any] = list(cast(Iterable[Any], name)) if several else [name]
        if not self._names:
            raise TokenGateError("use was given no names: pass one, or None, for each row.")
        for each in self._names:
            if each is not None and each not in known:
                raise TokenGateError(
                    f"use was given {brief(each)}, and the model's adapters are "
                    f"{', '.join(map(repr, known))}: pass one of these, or None for the base model."
                )
        self._model, self._told = model, _choices(model, self._layers, name)
        for context in contexts():
            other = _PENDING.get(context.owner)
            if other is not None and not set(self._layers).isdisjoint(other._layers):
                other._for_good()
        self._key = object()  # not the object itself, which could then not go
        try:
            _PENDING[self._key] = self
            self._begin(self._key)
            self._pending = True
        except BaseException:  # an interruption
            self._end(self._key)
            raise

    def __enter__(self) -> None:
        pending, self._pending = self._pending, False
        try:
            self._begin(self)
            if pending:
                self._end(self._key)
        except BaseException:  # an interruption, after which nobody leaves it
            self._end(self)
            self._end(self._key)
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._end(self)
        except BaseException:  # an interruption; the context is left all the same
            self._end(self)
            raise

    def __del__(self) -> None:
        if self._pending and not sys.is_finalizing():
            self._for_good()

    def _ipython_display_(self) -> None:
        # A notebook holds what it shows, and runs its cells in contexts of their own.
        if self._pending:
            self._for_good()

    def _begin(self, owner: object) -> None:
        with _SWITCHING:
            windows = any(isinstance(choice, Regional) for choice in self._told.values())
            context = enter(USE, dict(self._told), owner, windows=windows)
            for layer in self._layers:
                hold(layer, self._names, context)

    def _end(self, owner: object) -> None:
        with _SWITCHING:
            context = None
            try:
                context = leave(owner)
                let_go(context)
            except BaseException:
                let_go(context or leave(owner))
                raise

    def _for_good(self) -> None:
        """For all threads: there was no context, and nobody can enter it any more."""
        try:
            self._pending = False
            choice = next(iter(self._told.values()))
            if choice is None or isinstance(choice, str):
                self._switch(choice)
            else:
                warnings.warn(
                    "tokengate.use was given several adapters and was no context, so that they "
                    "were in use for nothing: write `with tokengate.use(model, ...):`.",
                    stacklevel=3,
                )
            self._end(self._key)
        except BaseException:  # an interruption, or the warning was made an error
            self._end(self._key)
            raise

    def _switch(self, name: str | None) -> None:
        busy = busy_elsewhere(self._model)
        if busy is not None:
            warnings.warn(
                f"tokengate.use puts {name!r} in use for good while another thread {busy}, whose "
                "layers may be of two adapters: switch within a context, "
                "`with tokengate.use(model, name):`.",
                stacklevel=4,
            )
        with _SWITCHING:
            before = [(layer, layer._in_use) for layer in self._layers]
            try:
                for layer in self._layers:
                    put_in_use(layer, name)
            except BaseException:  # an interruption, after which they would be of two adapters
                for layer, own in before:
                    put_in_use(layer, own, instead_of=name)
                raise
            count_change()


# Those that were made and not entered yet, by what owns their contexts.
_PENDING: WeakValueDictionary[object, use] = WeakValueDictionary()
_SWITCHING = threading.RLock()


def _choices(model: nn.Module, layers: Sequence[nn.Module], name: Any) -> dict[nn.Module, Any]:
    """What each layer is told: a name or None, `Rows` or `Regional`."""
    if name is None or isinstance(name, str):
        return dict.fromkeys(layers, name)
    patched = all_layers(model)
    routed = next((n for n, layer in patched.items() if may_be_idle(n, layer)), None)
    if routed is not None:
        raise TokenGateError(
            f"use was given several adapters, and {routed!r} is an expert's layer, which sees "
            "positions without their rows: pass one name for all."
        )
    names: dict[nn.Module, str] = {layer: n for n, layer in patched.items()}
    if isinstance(name, Mapping):
        given = {n: Region(valid_where("use", w), True).anew() for n, w in name.items()}
        return dict.fromkeys(layers, Regional(names, given))
    rows = Rows(list(name))
    own: dict[str, Region] = {
        each: RowsRegion([other == each for other in name]) for each in name if each is not None
    }
    regional = Regional(names, own)
    # Experts in a parameter know of their rows which positions they are.
    return {m: regional if isinstance(m, GatedExperts) else rows for m in layers}


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
