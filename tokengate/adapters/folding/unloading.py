"""Fold for good: what can be merged is the model's own weight, and what cannot is named."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from tokengate.adapters.folding.deciding import IN_PART, UNDECIDED, FoldedLayer
from tokengate.adapters.folding.folding import Folding, check_one_adapter, fold
from tokengate.arguments import in_our_words
from tokengate.errors import StillGatedWarning, TokenGateError, listed
from tokengate.gates.threshold import TokenGate
from tokengate.layers.changing import exclusive
from tokengate.layers.folded import let_go
from tokengate.layers.patched import module_names, require_layers
from tokengate.patching.patch import unpatch
from tokengate.reports.module_sparsity import ModuleSparsity
from tokengate.reports.report import SparsityReport
from tokengate.sharding import numbers_here

# The share of the positions at which gates that `force=` is advised for decide alike.
_NEARLY = 0.95


@in_our_words(
    otherwise={
        "safe_merge": "leave it out, as safe=True is the default",
        "adapter_names": (
            "save the one that is meant with tokengate.save(model, folder, name=...), and load it "
            "alone into a fresh base"
        ),
        "progressbar": "leave it out",
    },
)
@exclusive
def merge_and_unload(
    model: nn.Module,
    seen: SparsityReport | Iterable[Any] | None = None,
    *,
    force: float | None = None,
    safe: bool = True,
    dequantise: bool = False,
) -> Folding:
    """Fold `model` in place and for good, and say which of its layers stay gated.

        folding = tokengate.merge_and_unload(model, loader)
        folding.names("kept")  # []: the model is a plain base model, with nothing of tokengate

    As `fold`, whose other weights it lets go: there is no way back but to load base and adapter
    anew. Where no layer stays gated, the model is as `unpatch` leaves it, with other weights: the
    same objects, trainable as before. Of those that stay, a `StillGatedWarning` says how often they
    are open; beside the merged weights they run and are trained on, and `save` writes them alone.

    Args:
        model: a patched model.
        seen: as for `fold`; None where no data decides: without gates, or with no tau above 0.
        force, safe, dequantise: as for `fold`.

    Returns:
        What was done to each layer; it cannot be undone.

    Raises:
        TokenGateError: as of `fold`; `seen` is None and a gate may close. The model is then as it
            was.
    """
    check_one_adapter(model, "merge_and_unload")
    if seen is None:
        seen = _open_everywhere(model)
    folding = fold(model, seen, force=force, safe=safe, dequantise=dequantise)
    kept = {name: folding.layers[name] for name in folding.names("kept")}
    if kept:
        shown = (f"{name!r} ({_said(each)})" for name, each in kept.items())
        force_more = f"fold nearly decided gates with batches and force={_NEARLY}, or "
        try:
            warnings.warn(
                f"merge_and_unload left {len(kept)} of {len(folding.layers)} layers as they were "
                f"patched: {listed(shown)}; "
                f"{force_more * any(map(_nearly_decided, kept.values()))}keep tokengate beside the "
                "model.",
                StillGatedWarning,
                stacklevel=4,
            )
        except StillGatedWarning:  # made an error, of which the model is as it was
            folding.undo()
            raise
    let_go(model)
    folding.is_final = True
    if not kept:
        unpatch(model)
    return folding


def _nearly_decided(layer: FoldedLayer) -> bool:
    alike = max(layer.sparsity, 1 - layer.sparsity)
    return layer.reason in (UNDECIDED, IN_PART) and alike >= _NEARLY


def _said(layer: FoldedLayer) -> str:
    seen = layer.sparsity == layer.sparsity  # a NaN where nothing was
    return f"open at {100 * (1 - layer.sparsity):.1f} %: {layer.reason}" if seen else layer.reason


def _open_everywhere(model: nn.Module) -> SparsityReport:
    """What any data would show of layers whose gates, if any, cannot close."""
    patched = require_layers(model, "merge_and_unload")
    closing = [repr(name) for name, layer in patched.items() if _may_close(layer.gate)]
    if closing:
        raise TokenGateError(
            f"merge_and_unload was given no data, and the gates of {listed(closing)} may close, "
            "which data alone shows: pass batches or a report, merge_and_unload(model, loader)."
        )
    one = ModuleSparsity(sparsity=0.0, samples=1, positions=1, modified=1, tau=None)
    names = [own for name, layer in patched.items() for own in module_names(name, layer)]
    return SparsityReport(dict.fromkeys(names, one))


def _may_close(gate: nn.Module | None) -> bool:
    if not isinstance(gate, TokenGate):
        return gate is not None
    return any(tau is None or not tau <= 0 for tau in numbers_here([gate.tau]))
