"""A schedule's last thresholds, told by the model that has come of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokengate.errors import UnreachedSparsityWarning, brief
from tokengate.layers.batches import apart, evaluating
from tokengate.layers.calls import RECORD, in_context, unobserved
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import may_be_idle, module_names
from tokengate.sharding import in_processes
from tokengate.training.leading.last_calls import LEAST
from tokengate.training.measuring import watching
from tokengate.training.seen_scores import SeenScores, of_all_processes

# How many pairs of parts that go one way more than the other are no chance, and what is too small a
# change to matter.
_PAIRS, _SMALL = 20, 0.02
# How often the calls are made at most, and what is too small a change to make them once more.
_PASSES, _SAME = 4, 0.01


@dataclass
class Settled:
    """What was found.

    Attributes:
        thresholds: one of each layer, or one for all.
        closed: the share that they close of what these have shown.
        error: its standard error, as parts of the steps differ.
        was: the share that those before closed of it.
        moved: by how much what each layer closes changes, on average.
        stays: whether the data change, and those before are nearer in the end.
    """

    thresholds: list[float]
    closed: float
    error: float
    was: float
    moved: float
    stays: bool = False


def settled(
    model: nn.Module,
    patched: Mapping[str, Gated],
    steps: Sequence[Sequence[Callable[[], Any]]],
    share: float,
    now: Tensor,
    write: Callable[[Tensor], None],
) -> Settled | None:
    """Have thresholds close a `share` when the calls of `steps` are made again, in evaluation.

    What a schedule follows are scores of a model that goes on changing, and with everybody's
    dropout; this is of the model that there is in the end, as it will be evaluated. Where layers
    close elsewhere than before, later ones see other inputs: then the calls are made once more.

    They stay, and nothing is returned, where that would tell less: of few steps, of such that leave
    out a layer or fail, or whose data change in the course of a training, if what was followed is
    nearer in the end. Every rank must ask.

    Args:
        model: what is trained, with gates as they are `now`.
        patched: its layers that are led, by name.
        steps: what makes the calls of each, the last one last.
        share: of the positions.
        now: the thresholds, `(layers,)`, or `(1,)` for one of all.
        write: gives the gates such.
    """
    fewest = int(_over_ranks([len(steps)], now, "min")[0])
    if fewest < LEAST:
        return None
    tried: list[tuple[Tensor, Settled]] = []
    step, moved = torch.zeros_like(now), torch.inf
    for _ in range(_PASSES):
        told = _told(model, patched, steps[-fewest:], share, now)
        if told is None or (told.stays and not tried):
            break
        own = now.new_tensor(told.thresholds)
        if told.moved < _SAME:
            write(own)
            return told
        tried.append((now, told))
        turns, step = bool((own - now).sign() @ step.sign() < 0), own - now
        # Half of the way where whole ones go beyond and come back.
        now = (now * own).sqrt() if turns and told.moved > moved / 2 else own
        moved = told.moved
        write(now)
    if not tried:
        return None
    nearest, told = min(tried, key=lambda each: each[1].moved)
    write(nearest)
    return replace(told, closed=told.was)


def _told(
    model: nn.Module,
    patched: Mapping[str, Gated],
    steps: Sequence[Sequence[Callable[[], Any]]],
    share: float,
    now: Tensor,
) -> Settled | None:
    """What one pass tells, of gates as they are `now`."""
    names = {name: module_names(name, layer) for name, layer in patched.items()}
    seen = {own: _InParts() for each in names.values() for own in each}
    if not _called_again(model, patched, steps, seen, now):
        return None
    whole = [of_all_processes({own: seen[own].whole() for own in each}) for each in names.values()]
    some = [[own for own in each.values() if own.total] for each in whole]
    groups = some if len(now) > 1 else [[own for group in some for own in group]]
    # Of experts that were given no token the threshold stays.
    together = [SeenScores.together(group) if group else None for group in groups]
    found = [
        (before, share, share)
        if each is None
        else (*each.threshold(share), each.share_below(before))
        for each, before in zip(together, now.tolist(), strict=True)
    ]
    thresholds, closes, closed_before = map(list, zip(*found, strict=True))
    moved = [
        abs(own.share_below(new) - own.share_below(before))
        for group, new, before in zip(groups, thresholds, now.tolist(), strict=True)
        for own in group
    ] or [0.0]

    def shares(of: list[float]) -> list[list[float]]:
        each_own = zip(names.values(), of * (len(names) // len(of)), strict=True)
        return [seen[own].closed_by(threshold) for each, threshold in each_own for own in each]

    def off(of: list[float]) -> Tensor:
        return torch.tensor(_over_ranks(_off(shares(of)).tolist(), now, "mean"))

    closed, was, parts = fmean(closes), fmean(closed_before), off(thresholds)
    in_the_end, as_they_are = closed + _end(parts), was + _end(off(now.tolist()))
    stays = _trends(parts) and abs(as_they_are - share) <= abs(in_the_end - share)
    return Settled(thresholds, closed, float(parts.std()) / LEAST**0.5, was, fmean(moved), stays)


def _called_again(
    model: nn.Module,
    patched: Mapping[str, Gated],
    steps: Sequence[Sequence[Callable[[], Any]]],
    seen: Mapping[str, _InParts],
    now: Tensor,
) -> bool:
    """Whether the calls could be made on all ranks, and have shown all layers."""
    listeners = {own: each.listen for own, each in seen.items()}
    watchers, unseen = watching("SparsitySchedule", patched, listeners, scores=True)
    fails = False
    try:
        with (
            evaluating(model), apart(model), torch.compiler.set_stance("force_eager"),
            unobserved(), in_context(RECORD, watchers),
        ):  # fmt: skip
            for step, calls in enumerate(steps):
                for each in seen.values():
                    each.part = step * LEAST // len(steps)
                for call in calls:
                    call()
    except Exception as problem:  # whatever a model may do that is trained alone
        fails = True
        _say_why(problem, len(steps))
    lacks = any(not may_be_idle(name, layer) for name, layer in unseen.items())
    return not any(_over_ranks([fails or lacks], now, "max"))


class _InParts:
    """The scores of a layer or expert, apart by when they were called, in as many parts as there
    are steps at least.

    Attributes:
        part: that those belong to which are heard now.
    """

    def __init__(self) -> None:
        self.parts = [SeenScores() for _ in range(LEAST)]
        self.part = 0

    def listen(self, *told: Any) -> None:
        self.parts[self.part].listen(*told)

    def whole(self) -> SeenScores:
        return SeenScores.of(self.parts)

    def closed_by(self, threshold: float) -> list[float]:
        """The share of each part; NaN where there was no position."""
        return [part.share_below(threshold) if part.total else torch.nan for part in self.parts]


def _off(closed: list[list[float]]) -> Tensor:
    """How far each part is off the mean of all in what is closed, `(parts,)`.

    Not all layers, or experts, need be called in each: each has its own mean, and counts as much.
    """
    shares = torch.tensor(closed, dtype=torch.float64)
    off = shares - shares.nanmean(-1, keepdim=True)
    called = shares.isfinite().double().mean(-1, keepdim=True)
    return (off / called).nan_to_num(0).mean(0)


def _trends(off: Tensor) -> bool:
    """Whether what is closed rises or falls from part to part, and not by chance: `(parts,)`.

    Of one model that is so where its inputs change. By Kendall's rank test: of eight numbers in any
    order 24 of 28 pairs go one way once in 70 times.
    """
    later = (off - off.unsqueeze(-1)).triu(1).sign().sum().abs()
    first, last = off.chunk(2)
    return bool((later >= _PAIRS) & ((last.mean() - first.mean()).abs() > _SMALL))


def _end(off: Tensor) -> float:
    """Where the line through `off`, `(parts,)`, of mean 0, has come to in the end."""
    x = torch.arange(len(off)) - (len(off) - 1) / 2
    return float((x * off).sum() / x.square().sum()) * len(off) / 2


def _over_ranks(values: Sequence[float], like: Tensor, how: str) -> list[float]:
    """The least, largest or mean of each over all ranks; on a device that these can talk of."""
    if not in_processes():
        return list(values)
    all_values = torch.tensor(values, dtype=like.dtype, device=like.device)
    by = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "mean": dist.ReduceOp.SUM}[how]
    dist.all_reduce(all_values, by)
    return (all_values / (dist.get_world_size() if how == "mean" else 1)).tolist()


def _say_why(problem: Exception, steps: int) -> None:
    warnings.warn(
        f"SparsitySchedule called the model again, in evaluation, with what its last {steps} steps "
        f"gave it, to set its last thresholds, and that failed ({type(problem).__name__}: "
        f"{brief(str(problem))}), so that they are those that it followed: pass settle=False, or "
        "set them by tokengate.calibrate.",
        UnreachedSparsityWarning,
        stacklevel=10,
    )
