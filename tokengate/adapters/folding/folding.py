"""Fold what a gate decides alike at every position: into W0, or away."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokengate.adapters.folding.deciding import FoldedLayer as FoldedLayer
from tokengate.adapters.folding.deciding import decided
from tokengate.adapters.folding.merging import merged_weights
from tokengate.adapters.folding.output_error import output_error
from tokengate.adapters.weights import all_finite
from tokengate.arguments import positive, switch
from tokengate.errors import TokenGateError, brief
from tokengate.gates.firm import FirmGate
from tokengate.layers.batches import check_batches, evaluating, run
from tokengate.layers.changing import Outcome, changing, exclusive
from tokengate.layers.experts.folded_experts import experts_as_folded
from tokengate.layers.experts.gated_experts import GatedExperts
from tokengate.layers.folded import (
    Folded,
    as_folded,
    fold_layers,
    folded,
    unchanged_if_interrupted,
    unfold,
)
from tokengate.layers.following import follow, unfollow
from tokengate.layers.gated_linear import Gated
from tokengate.layers.named_adapters import adapter_names
from tokengate.layers.patched import require_layers
from tokengate.patching.wrappers import check_can_fold
from tokengate.reports.recording import record
from tokengate.reports.report import SparsityReport
from tokengate.sharding import is_sharded, numbers_here


class Folding(Outcome):
    """What `fold` did; print it for a table.

    Attributes:
        layers: every layer that was patched, by name; experts one by one, as reports name them.
        error: ||difference|| / ||output|| over the batches, of the model's first output; None
            where `fold` was given a report instead.
        is_final: whether there is no way back, as after `merge_and_unload`.
    """

    is_final = False

    def __init__(
        self, model: nn.Module, layers: dict[str, FoldedLayer], error: float | None
    ) -> None:
        self._model = model
        self.layers, self.error = layers, error

    @property
    def _by(self) -> str:  # type: ignore[override]
        return "merge_and_unload" if self.is_final else "fold"

    def names(self, action: str) -> list[str]:
        """The layers that were "merged", "dropped" or "kept"."""
        return [name for name, layer in self.layers.items() if layer.action == action]

    def undo(self) -> None:
        """The model as it was patched before; `unpatch` does the same and goes on.

        Raises:
            TokenGateError: it is final.
        """
        if self.is_final:
            raise TokenGateError(
                "undo was asked of what merge_and_unload did, which keeps no other weight: load "
                "the base model and the adapter anew."
            )
        with changing(self._model, "undo"), unchanged_if_interrupted(self._model):
            unfold(self._model)
            _settle(self._model)

    def __str__(self) -> str:
        width = max(len(name) for name in self.layers)
        lines = [f"{'layer':{width}}  sparsity (%)  action   reason"]
        lines += [
            f"{name:{width}}  {100 * each.sparsity:12.1f}  {each.action:7}  {each.reason}"
            for name, each in self.layers.items()
        ]
        counts = Counter(each.action for each in self.layers.values())
        summary = ", ".join(f"{counts[action]} {action}" for action in _ACTIONS)
        if self.error is not None:
            summary += f"; the output differs by {self.error:.2g} of its norm"
        return "\n".join([*lines, summary])


_ACTIONS = ("merged", "dropped", "kept")


@exclusive
def fold(
    model: nn.Module,
    seen: SparsityReport | Iterable[Any],
    *,
    force: float | None = None,
    safe: bool = True,
    dequantise: bool = False,
) -> Folding:
    """Merge layers whose gate is open at every position seen, drop those closed at every one.

        folding = tokengate.fold(model, loader)
        print(folding)

    A merged layer has W0 + M's matrix for its weight and costs what the base layer costs; a dropped
    one is the base layer again; the rest stay gated. On what was seen the model computes what it
    did, but for the rounding of the merged weights to W0's dtype; on other data, a gate that would
    have decided otherwise is gone. (Section 5 of the paper: many of its DoRA modules end at 0 % or
    100 %.) Of experts in a 3-D parameter each is folded, or kept, by itself; one that saw no
    position is kept.

    It can be undone, by the folding's `undo` or by `unpatch`, which gives W0 back bit for bit: the
    other weight of a merged layer is kept beside it, at the cost of its memory. `save` writes what
    is merged as a modification without a gate, and nothing of what was dropped.

    Args:
        model: a patched model.
        seen: a `SparsityReport` of data to be exact on; or such data, as batches that `model` is
            called with (dicts by keyword, tuples by position), which are gone through twice.
        force: also fold gates that decide alike at this share of the positions, e.g. 0.95; with
            batches alone, for the error that the folding then states.
        safe: False merges also where the merged weight gives other outputs than the modification,
            beyond the rounding of W0's dtype; or, of a quantised W0, beyond what its library's
            rounding of the inputs can explain.
        dequantise: True makes quantised layers dense where they are merged, which takes the memory
            of a dense weight beside that of the quantised one: the sum of the dequantised W0 and
            M's matrix, in the dtype that the layer computes in.

    Returns:
        What was done, with the measured error.

    Raises:
        TokenGateError: no layer is patched, or it is wrapped (DDP, FSDP), compiled or within
            `disabled`; an argument is wrong; the report is of other layers; W0 of a layer to be
            merged is quantised, without `dequantise=True`; a tau, a merged weight or an output is
            not finite, or with `safe=True` a merged weight not right. The model is then as it was.
    """
    patched = require_layers(model, "fold")
    check_can_fold(model)
    switch("safe", safe)
    switch("dequantise", dequantise)
    if folded(model):
        raise TokenGateError("fold was asked of a model that is folded already: undo() that first.")
    check_one_adapter(model, "fold")
    if force is not None and positive("force", force) > 1:
        raise TokenGateError(f"force={brief(force)} is above 1: pass a share, e.g. force=0.95.")
    for name, layer in patched.items():
        _check_gate(name, layer)
    batches = None
    if not isinstance(seen, SparsityReport):
        checked = check_batches("fold", seen)
        if iter(seen) is seen:
            raise TokenGateError(
                "fold goes through its batches twice, and these can be gone through once: pass a "
                "list of them."
            )
        batches = seen
        seen, partly = _sparsities(model, checked)
    elif force is not None:
        raise TokenGateError(
            f"fold was given force={force} without batches, on which the error of what is forced "
            "is measured: pass some."
        )
    else:
        partly = {name for name, layer in patched.items() if _may_open_in_part(layer)}
    threshold = 1.0 if force is None else force
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    done: dict[str, FoldedLayer] = {}
    entries: dict[str, Folded] = {}
    for name, layer in patched.items():
        in_part = force is None and name in partly
        own = decided(name, layer, seen, threshold, owners, dequantise, in_part)
        merged, errors = merged_weights(own, layer, safe)
        done |= {each: replace(own[each], error=errors.get(each)) for each in own}
        actions = [each.action for each in own.values()]
        if set(actions) == {"kept"}:
            continue
        if isinstance(layer, GatedExperts):
            entries[name] = experts_as_folded(layer, actions, merged)
        else:
            entries[name] = as_folded(layer, merged)
    folding = Folding(model, done, None)
    with unchanged_if_interrupted(model, entries.values()):
        fold_layers(model, entries)
        _settle(model)
        if batches is not None:
            folding.error = output_error(model, batches)
    return folding


def check_one_adapter(model: nn.Module, asked: str) -> None:
    """An error if there are several, which could not be exchanged any more."""
    if len(adapter_names(model)) > 1:
        raise TokenGateError(
            f"{asked} was asked of a model with several adapters: take the others out with "
            "tokengate.unpatch(model, name=...), or save the one to merge with "
            "tokengate.save(model, folder, name=...), and load it alone into a fresh base."
        )


def _settle(model: nn.Module) -> None:
    # Modules around patched layers are followed, which may be others now.
    unfollow(model)
    follow(model)


def _sparsities(model: nn.Module, batches: Iterable[Any]) -> tuple[SparsityReport, set[str]]:
    """What was closed, and in which layers a gate gave a number between 0 and 1."""
    partly: set[str] = set()

    def look(name: str, gate: nn.Module, given: Any, a: Tensor) -> None:
        if a.is_floating_point() and bool(((a > 0) & (a < 1)).any()):
            partly.add(name)

    with evaluating(model), record(model) as rec, contextlib.ExitStack() as hooks:
        for name, layer in require_layers(model, "fold").items():
            if layer.gate is not None:
                hooks.enter_context(layer.gate.register_forward_hook(partial(look, name)))
        for batch in batches:
            run(model, batch)
    return rec.report(), partly


def _may_open_in_part(layer: Gated) -> bool:
    """Which a report does not tell."""
    gate = layer.gate
    return isinstance(gate, FirmGate) and any(t is None or t > 0 for t in numbers_here([gate.tau]))


def _check_gate(name: str, layer: Gated) -> None:
    """A gate with a NaN for its tau is open everywhere, but nobody has decided so."""
    for key, value in {} if layer.gate is None else layer.gate.state_dict().items():
        if not (value.is_meta or is_sharded(value) or all_finite(value)):
            raise TokenGateError(
                f"fold found a value that is not finite in {f'{name}.gate.{key}'!r}, so that the "
                "gate decides nothing: set it anew with calibrate, or go back to the last adapter "
                "before training diverged."
            )
