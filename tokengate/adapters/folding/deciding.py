"""What to do with a layer, by what its gate did: merge it, drop it, or leave it gated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import cast

from tokengate.errors import TokenGateError
from tokengate.layers.experts.gated_experts import GatedExperts
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import module_names
from tokengate.linears.accelerate_hooks import is_offloaded
from tokengate.linears.linear_like import LinearLike, LinearSlice, groups_of, holder, whole
from tokengate.linears.quantised import is_quantised, unreadable
from tokengate.reports.module_sparsity import ModuleSparsity
from tokengate.reports.report import SparsityReport
from tokengate.sharding import is_absent, is_sharded
from tokengate.training.rank_allocator import LED

# Why a layer is kept that `force=` may fold.
UNDECIDED = "open at some positions, closed at others"
IN_PART = "open in part at some positions"


@dataclass(frozen=True)
class FoldedLayer:
    """What `fold` did to one layer."""

    sparsity: float
    """Share of the positions seen that its gate left unmodified."""
    action: str
    """"merged", "dropped" or "kept"."""
    reason: str
    error: float | None = None
    """Of a merged layer: ||difference|| / ||h|| on random inputs, h being W0 x + M(x); of a
    quantised one, with W0 x as its library computes it. Rounding, mostly.
    """


def decided(
    name: str,
    layer: Gated,
    seen: SparsityReport,
    threshold: float,
    owners: Counter[int],
    dequantise: bool,
    in_part: bool,
) -> dict[str, FoldedLayer]:
    """What to do with a layer, or with each of its experts, by the names that reports have.

    Args:
        name: of the layer.
        layer: it.
        seen: what its gate did.
        threshold: the share of positions at which it decides alike, for it to be folded.
        owners: how many modules hold each parameter, by its id.
        dequantise: whether a quantised weight may be made dense.
        in_part: whether the gate opened in part anywhere.

    Raises:
        TokenGateError: the report has nothing of it; its weight is quantised, and may not be dense.
    """
    names = module_names(name, layer)
    found = [seen.modules.get(own) for own in names]
    if None in found:
        raise TokenGateError(
            f"fold was given a report without {name!r}, which is patched: record the model as it "
            "is now."
        )
    modules = dict(zip(names, cast(list[ModuleSparsity], found), strict=True))
    some_seen = any(each.positions for each in modules.values())
    done = {}
    for own, module in modules.items():
        # Without a gate, an expert that saw no position is merged with the others.
        closed = 1 - module.modified / module.positions if module.positions else 0.0
        if module.positions or (layer.gate is None and some_seen):
            done[own] = _decided(closed, name, layer, threshold, owners, dequantise)
        else:
            done[own] = FoldedLayer(module.sparsity, "kept", "no position was seen")
        if done[own].action == "merged" and in_part:
            done[own] = replace(done[own], action="kept", reason=IN_PART)
    return _together(layer, done) if isinstance(layer, GatedExperts) else done


def _together(layer: GatedExperts, done: dict[str, FoldedLayer]) -> dict[str, FoldedLayer]:
    """The same, where experts that are folded can be told from those that stay beside them."""
    gate = layer.gate
    if gate is None or not any(each.action == "kept" for each in done.values()):
        return done
    parts = [*layer.modification.parameters(), *gate.parameters()]
    if gate.is_led:
        reason, all_of = "a SparsitySchedule leads its gate", True
    elif layer.modification in LED:
        reason, all_of = "a RankAllocator leads its ranks", True
    elif any(map(is_sharded, parts)):
        reason, all_of = "its modification is sharded, and others of its experts stay gated", True
    else:
        # Saved beside others, what is merged has its gate, opened by its threshold.
        reason, all_of = "its gate has no threshold, and others of its experts stay gated", False
    if not all_of and gate.threshold is not None:
        return done
    return {
        own: replace(each, action="kept", reason=reason)
        if each.action == "merged" or (all_of and each.action != "kept")
        else each
        for own, each in done.items()
    }


def _decided(
    closed: float,
    name: str,
    layer: Gated,
    threshold: float,
    owners: Counter[int],
    dequantise: bool,
) -> FoldedLayer:
    if closed >= threshold:
        return FoldedLayer(closed, "dropped", f"closed at {_portion(closed)}")
    if 1 - closed < threshold:
        return FoldedLayer(closed, "kept", UNDECIDED)
    reason = _unmergeable(layer, owners)
    if reason is not None:
        return FoldedLayer(closed, "kept", f"open at {_portion(1 - closed)}, but {reason}")
    if is_quantised(cast(LinearLike, layer)) and not dequantise:
        raise TokenGateError(
            f"fold would merge {name!r}, whose weight is quantised and could hold the sum only "
            "rounded: pass dequantise=True to make it dense, or load the base without quantisation."
        )
    return FoldedLayer(closed, "merged", f"open at {_portion(1 - closed)}")


def _portion(value: float) -> str:
    return "every position" if value == 1 else f"{100 * value:.1f} % of the positions"


def _unmergeable(layer: Gated, owners: Counter[int]) -> str | None:
    if not layer.modification.linear:
        return f"{type(layer.modification).__name__} is no matrix"
    linear = whole(cast(LinearLike, layer))
    if groups_of(linear) > 1:
        return "M(x) reads all channels and a grouped convolution does not"
    weight = holder(linear)
    if is_sharded(weight) or is_absent(weight):
        return "its weight is sharded"
    if weight.is_meta or is_offloaded(getattr(linear, "weight_holder", linear)):
        return "its weight is elsewhere"
    if owners[id(weight)] != 1:
        made = "made of others" if owners[id(weight)] == 0 else "another module's, too"
        return f"its weight is {made}"
    if is_quantised(linear):
        if isinstance(layer, LinearSlice):
            return "it is a slice of a quantised layer"
        if (reason := unreadable(linear)) is not None:
            return f"W0 is what {reason}"
    return None
