"""A schedule's last thresholds, told by the model that has come of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokengate.errors import UnreachedSparsityWarning
from tokengate.kernels.norms import Norms
from tokengate.layers.batches import apart, evaluating
from tokengate.layers.calls import RECORD, in_context, unobserved
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import may_be_idle, module_names
from tokengate.training.leading.last_calls import LEAST
from tokengate.training.measuring import watching
from tokengate.training.seen_scores import SeenScores

# Of how many standard errors a trend is no chance, and how small a one does not matter.
_ERRORS, _SMALL = 2.5, 0.01


@dataclass
class Settled:
    """What was found.

    Attributes:
        thresholds: one of each layer, or one for all.
        closed: the share that they close of what these have shown.
        error: its standard error, as steps differ.
    """

    thresholds: list[float]
    closed: float
    error: float


def settled(
    model: nn.Module,
    patched: Mapping[str, Gated],
    steps: Sequence[Sequence[Callable[[], Any]]],
    share: float,
    now: Tensor,
) -> Settled | None:
    """The thresholds that close a `share` when the calls of `steps` are made again, in evaluation.

    What a schedule follows are scores of a model that goes on changing, and with everybody's
    dropout; this is of the model that there is in the end, as it will be evaluated.

    None where that would tell less: of few steps, of such that leave out a layer, or whose data
    change in the course of a training, which is followed better. Every rank must ask.

    Args:
        model: what is trained, with gates as they are `now`.
        patched: its layers that are led, by name.
        steps: what makes the calls of each, the last one last.
        share: of the positions.
        now: the thresholds, `(layers,)`, or `(1,)` for one of all.
    """
    fewest = int(_over_ranks([len(steps)], now, "min")[0])
    if fewest < LEAST:
        return None
    names = {name: module_names(name, layer) for name, layer in patched.items()}
    each_now = zip(names.values(), now.expand(len(names)).tolist(), strict=True)
    seen = {name: _Seen(before) for each, before in each_now for name in each}
    listeners = {name: each.listen for name, each in seen.items()}
    watchers, unseen = watching("SparsitySchedule", patched, listeners, scores=True)
    problem: Exception | None = None
    eager = torch.compiler.set_stance("force_eager")
    try:
        with evaluating(model), apart(model), unobserved(), eager, in_context(RECORD, watchers):
            for calls in steps[-fewest:]:
                for call in calls:
                    call()
                for each in seen.values():
                    each.next_step()
    except Exception as raised:  # whatever a model may do that is trained alone
        problem = raised
    lacks = any(not may_be_idle(name, layer) for name, layer in unseen.items())
    failed, lacking = _over_ranks([problem is not None, lacks], now, "max")
    if problem is not None:
        _say_why(problem, len(steps))
    if failed or lacking:
        return None
    off = _off([each.closed for each in seen.values()])
    off = torch.tensor(_over_ranks(off.tolist(), now, "mean"))
    if _trends(off):
        return None
    groups = [list(_of_all_ranks({own: seen[own] for own in each})) for each in names.values()]
    if len(now) == 1:
        groups = [[each for group in groups for each in group]]
    found = [
        # Of experts that were given no token the threshold stays.
        SeenScores.together(group).threshold(share) if group else (before, share)
        for group, before in zip(groups, now.tolist(), strict=True)
    ]
    thresholds, closes = zip(*found, strict=True)
    ranks = dist.get_world_size() if _in_ranks() else 1
    error = float(off.std()) / (fewest * ranks) ** 0.5
    return Settled(list(thresholds), sum(closes) / len(closes), error)


class _Seen(SeenScores):
    """The scores of a layer or expert, and what `before` closes of them, in step after step."""

    def __init__(self, before: float) -> None:
        super().__init__()
        self.before = before
        self.closed: list[float] = []
        self._closed = self._counted = 0.0

    def listen(self, of_m: Norms, of_w: Norms, weights: Tensor, scores: Tensor) -> None:
        super().listen(of_m, of_w, weights, scores)
        self._closed += float((weights * (scores < self.before)).sum())
        self._counted += float(weights.sum())

    def next_step(self) -> None:
        self.closed.append(self._closed / self._counted if self._counted else torch.nan)
        self._closed = self._counted = 0.0


def _off(closed: list[list[float]]) -> Tensor:
    """How far each step is off the mean of all in what is closed, `(steps,)`.

    Not all layers, or experts, need be called in each: each has its own mean, and counts as much.
    """
    shares = torch.tensor(closed, dtype=torch.float64)
    off = shares - shares.nanmean(-1, keepdim=True)
    called = shares.isfinite().double().mean(-1, keepdim=True)
    return (off / called).nan_to_num(0).mean(0)


def _trends(off: Tensor) -> bool:
    """Whether what is closed rises or falls from step to step, and not by chance: `(steps,)`.

    Of one model that is so where its inputs change.
    """
    steps = torch.arange(len(off)) - (len(off) - 1) / 2
    square = steps.square().sum()
    slope = (steps * off).sum() / square
    error = ((off - slope * steps).square().sum() / (len(off) - 2) / square).sqrt()
    return bool((slope.abs() > _ERRORS * error) & (slope.abs() * len(off) > _SMALL))


def _in_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def _over_ranks(values: Sequence[float], like: Tensor, how: str) -> list[float]:
    """The least, largest or mean of each over all ranks; on a device that these can talk of."""
    if not _in_ranks():
        return list(values)
    all_values = torch.tensor(values, dtype=like.dtype, device=like.device)
    by = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "mean": dist.ReduceOp.SUM}[how]
    dist.all_reduce(all_values, by)
    return (all_values / (dist.get_world_size() if how == "mean" else 1)).tolist()


def _of_all_ranks(seen: Mapping[str, SeenScores]) -> Iterable[SeenScores]:
    """What all have seen, of each that somebody has seen anything of."""
    parts = [seen]
    if _in_ranks():
        parts = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, dict(seen))
    for name in seen:
        whole = SeenScores()
        for part in parts:
            own = part[name]
            if own.total:
                whole.include(own.bins, own.weights, own.heaviest)
        if whole.total:
            yield whole


def _say_why(problem: Exception, steps: int) -> None:
    warnings.warn(
        f"SparsitySchedule called the model again, in evaluation, with what its last {steps} steps "
        f"gave it, to set its last thresholds, and that failed ({type(problem).__name__}: "
        f"{str(problem).rstrip('.')}), so that they are those that it followed: pass settle=False, "
        "or set them by tokengate.calibrate.",
        UnreachedSparsityWarning,
        stacklevel=2,
    )
