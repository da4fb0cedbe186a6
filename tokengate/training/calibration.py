"""Thresholds for modifications that were trained without a gate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import nn

from tokengate.arguments import share, switch
from tokengate.errors import TokenGateError, UnreachedSparsityWarning, listed
from tokengate.gates.fisher import FisherGate
from tokengate.layers.changing import exclusive
from tokengate.layers.patched import module_names
from tokengate.patching.wrappers import check_gathered
from tokengate.training.leading.led_gates import refuse_mixed
from tokengate.training.measuring import measure
from tokengate.training.seen_scores import SeenScores, of_all_processes, percent
from tokengate.training.thresholds import with_threshold


@exclusive
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float = 0.5,
    *,
    per_layer: bool = True,
    warm_start: bool = False,
    reduce: bool = False,
) -> dict[str, float]:
    """Set every tau so that a share of the positions in `batches` is left unmodified:

        model = tokengate.patch(model, ["q_proj", "v_proj"])    # or load, or import from PEFT
        tokengate.calibrate(model, loader, sparsity=0.5)

    One pass, in evaluation mode and with all gates open, as the modifications were trained; tau is
    then the quantile of r = ||M(x)|| / ||W0 x|| in its layer, over all real positions, those of
    each sample together counting as one, as in eq. 23; for gates with another score than r, that of
    their `scores`. Memory does not grow with the data: r is counted in bins 0.07 % wide. Where
    gates close, later layers see other inputs than in this pass:
    `record` tells what sparsity that gives.

    Gates that were trained, or led by a `SparsitySchedule`, go on from there:

        tokengate.calibrate(model, loader, sparsity=0.6, per_layer=False, warm_start=True)

    The pass is then one of the model as it is, so that later layers see what they will see but for
    what changes now; another call is nearer.

    Where no tau closes that share, it is the nearest one, and an `UnreachedSparsityWarning` names
    the layers: those that see many positions with W0 x = 0, which every tau leaves open, as padding
    without a mask may be, or many with the same r.

    Of several processes each sets its own taus by the batches that it is given: give all the same,
    or have all call it with `reduce=True`, each with its own.

    The rule is not the paper's, which learns tau.

    Args:
        model: a patched model with gates.
        batches: what the model is called with: dicts by keyword, tuples by position.
        sparsity: the share to be left unmodified in every layer, in [0, 1).
        per_layer: False for one threshold, which closes that share of all layers together, as a
            schedule leads them; each layer, or expert, that does anything counts as much.
        warm_start: True for a pass with the gates as they are.
        reduce: True for taus by the batches of all processes of `torch.distributed`.

    Returns:
        The new tau of every layer by name, or of every expert by its own. What has an r of 0
        everywhere keeps its gate open.

    Raises:
        TokenGateError: no layer of the model has a gate with a threshold, or a schedule leads
            them, or those of "fisher" have no Q yet, or they compare different things, and not
            `per_layer`; `use` was given rows;
            there are no batches, or a layer was called in none of them; M(x) is 0
            everywhere, or it or W0 x is not finite somewhere; an argument is wrong. The taus are
            then as they were.
    """
    share("sparsity", sparsity)
    gated = with_threshold("calibrate", model)
    check_gathered(model, "calibrate", "calibrate the model before it is wrapped")
    gates = {name: layer.gate for name, (layer, _) in gated.items() if layer.gate is not None}
    if led := [repr(name) for name, gate in gates.items() if gate.is_led]:
        raise TokenGateError(
            f"calibrate was asked of {listed(led)}, whose thresholds a SparsitySchedule sets anew "
            "at its next step: call it when training is over, or the schedule's detach() before."
        )
    unfed = [repr(n) for n, g in gates.items() if isinstance(g, FisherGate) and not g.Q.any()]
    if len(unfed) == len(gates):
        raise TokenGateError(
            f"calibrate was asked of {listed(unfed)}, to which no gradient has shown what the loss "
            "hangs on: train with a SparsitySchedule, under which backward feeds their Q."
        )
    switch("reduce", reduce)
    if not switch("per_layer", per_layer):
        refuse_mixed("calibrate was asked to set", gates)
    names = {name: module_names(name, layer) for name, (layer, _) in gated.items()}
    counted = {each: SeenScores() for own in names.values() for each in own}
    taus = {name: tau.detach().clone() for name, (_, tau) in gated.items()}
    try:
        if not switch("warm_start", warm_start):
            for _, tau in gated.values():
                tau.data.zero_()
        patched = {name: layer for name, (layer, _) in gated.items()}
        listeners = {name: seen.listen for name, seen in counted.items()}
        measure("calibrate", model, patched, listeners, batches, scores=True)
        if reduce:
            counted = of_all_processes(counted)
        if not any(seen.moved() for seen in counted.values()):
            raise TokenGateError(
                f"calibrate found M(x) = 0 at every position of this {type(model).__name__}, as it "
                "is before training, where no tau closes a share: train the modifications first, "
                "or load trained ones."
            )
        seen = {name: each for name, each in counted.items() if each.total}
        judged = seen
        if not per_layer:
            all_seen = SeenScores.together(each for each in seen.values() if each.moved())
            seen = {name: all_seen if each.moved() else each for name, each in seen.items()}
            judged = {"all layers": all_seen}
        found = {name: tau.clone() for name, tau in taus.items()}
        for name, tau in found.items():
            for at, each in enumerate(names[name]):
                if each in seen:  # of an expert that saw no position, it stays
                    tau[at] = seen[each].threshold(sparsity)[0]
        taus = found
    finally:
        for name, (_, tau) in gated.items():
            tau.data.copy_(taus[name])
    _warn_of_misses(judged, sparsity)
    pairs = [zip(names[name], tau.tolist(), strict=True) for name, tau in taus.items()]
    return dict(chain.from_iterable(pairs))


def _warn_of_misses(seen: Mapping[str, SeenScores], sparsity: float) -> None:
    found = {name: each.miss(sparsity) for name, each in seen.items()}
    missed = [f"{name!r} ({miss})" for name, miss in found.items() if miss]
    if missed:
        warnings.warn(
            f"calibrate was asked to close {percent(sparsity)} of the positions, which no tau "
            f"does in {listed(missed)}: mask padding, or pass other batches or "
            "another sparsity.",
            UnreachedSparsityWarning,
            stacklevel=4,
        )
