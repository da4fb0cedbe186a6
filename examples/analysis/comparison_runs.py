"""One run of the comparison: a variant trained on a task, and what came out."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from comparison_task import PARTS, Task
from torch import nn

import tokengate

SCALES = (0.8,)  # of M(x) at test, of what was trained without a gate
_WARMUP = 0.06
# Of tau in a training whose lambda is searched. The rule has a sparsity of its own without lambda,
# which this lets it reach: where that is too high, tau may travel less below the least lambda.
_TRAVEL, _LEAST = 1.5, -6.5


@dataclass(frozen=True)
class Settings:
    """What a run is of; the key of its results.

    Attributes:
        sparsity: share of positions that is to be left alone, or of layers that are left out.
        rows: to train on; None for all.
        knob: of a variant that has one to be searched, which moves its sparsity.
    """

    task: str
    variant: str
    method: str = "lora"
    rank: int = 8
    sparsity: float = 0.6
    rows: int | None = None
    lr: float = 1e-3
    seed: int = 0
    knob: float | None = None

    def key(self) -> str:
        """By which results are found again."""
        return repr(sorted(asdict(self).items()))

    def plain(self) -> Settings:
        """The ungated run with the same settings."""
        return replace(self, variant="ungated", sparsity=0.0, knob=None)


@dataclass(frozen=True)
class Variant:
    """How positions, or layers, are left alone.

    Attributes:
        label: for tables.
        gate: as `patch` takes it.
        led: whether a `SparsitySchedule` brings it to its sparsity.
        left_out: "select" or "suggest" leaves whole layers out.
        knob: the first value of what its sparsity hangs on, and a step that closes more.
        share: of the rank.
    """

    label: str
    gate: Any = False
    led: bool = False
    left_out: str = ""
    knob: tuple[float, float] | None = None
    share: float = 1.0


VARIANTS = {
    "ungated": Variant("ungated"),
    "rank": Variant("smaller rank, same cost", share=0.4),
    "select": Variant("layers left out (select by fisher)", left_out="select"),
    "suggest": Variant("layers left out (suggest)", left_out="suggest"),
    "random": Variant("random", "random"),
    # By its own rule: the logarithm of lambda is searched, and below -6.5 that of s.
    "threshold": Variant("threshold, lambda tuned", "threshold", knob=(-4.0, 0.5)),
    "threshold-led": Variant("threshold, led", "threshold", led=True),
    "fisher": Variant("fisher", "fisher", led=True),
    "firm": Variant("firm", "firm", led=True),
    # Where its sigmoid begins, downwards.
    "sigmoid": Variant("sigmoid", "sigmoid", knob=(0.0, 0.5)),
}


def perform(task: Task, settings: Settings, plain: dict[str, Any] | None) -> dict[str, Any]:
    """Train and evaluate; `plain` is the ungated run that "select" selects by."""
    began = time.process_time()
    variant = VARIANTS[settings.variant]
    model = task.model(settings.seed)
    torch.manual_seed(settings.seed)
    targets = _targets(task, model, settings, plain)
    tokengate.patch(
        model,
        targets,
        settings.method,
        rank=max(1, round(variant.share * settings.rank)),
        gate=variant.gate,
        gate_options=_gate_options(settings),
        train=list(task.head),
    )
    loss = _train(task, model, settings)
    found: dict[str, Any] = {"loss": loss, "score": {}, "sparsity": {}}
    for part in PARTS:
        with tokengate.record(model) as rec:
            found["score"][part] = task.score(model, part)
        report = rec.report()
        found["sparsity"][part] = 1 - (1 - report.sparsity) * _adapted(settings)
    found["drift"] = float(tokengate.drift(model, task.own, measure="kl"))
    if settings.variant == "ungated":
        found["scaled"] = [_scaled(task, model, scale) for scale in SCALES]
        batches = list(task.batches(settings.seed, settings.rows))[-16:]
        found["fisher"] = tokengate.fisher_scores(model, batches, task.loss)
    found["layers"] = len(tokengate.layers(model))
    if variant.left_out:
        found["named"] = targets
    found["seconds"] = time.process_time() - began
    return found


def _adapted(settings: Settings) -> float:
    """The share of layers that is modified."""
    return 1 - settings.sparsity if VARIANTS[settings.variant].left_out else 1.0


def _targets(
    task: Task, model: nn.Module, settings: Settings, plain: dict[str, Any] | None
) -> list[str]:
    names = task.targets(model)
    kept = 1 - settings.sparsity
    match VARIANTS[settings.variant].left_out:
        case "select":
            assert plain is not None
            return tokengate.select(plain["fisher"], kept, by="fisher")
        case "suggest":
            every = task.batches(settings.seed, settings.rows)
            batches = list(itertools.islice(every, task.steps // 4))
            options = {"targets": names, "train": list(task.head), "loss": task.loss}
            return tokengate.suggest(model, batches, kept, **options)
    return names


def _gate_options(settings: Settings) -> dict[str, Any]:
    match settings.variant:
        case "random":
            return {"sparsity": settings.sparsity}
        case "threshold":
            return {"penalty": 10.0 ** max(settings.knob, _LEAST)}
        case "sigmoid":
            return {"start": -settings.knob}
    return {}


def _train(task: Task, model: nn.Module, settings: Settings) -> float:
    """AdamW under a warm-up and a linear decay, which leaves tau's rate as it is; the last loss."""
    steps = task.steps
    travel = _TRAVEL
    if settings.variant == "threshold":
        travel *= 10.0 ** min(0.0, settings.knob - _LEAST)
    groups = tokengate.param_groups(model, lr=settings.lr, s=travel / steps, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups)
    if VARIANTS[settings.variant].led:
        tokengate.SparsitySchedule(model, optimizer, settings.sparsity, steps)
    warm = max(1, int(_WARMUP * steps))

    def rate(step: int) -> float:
        return min((step + 1) / warm, (steps - step) / (steps - warm))

    rates = [rate] + [lambda step: 1.0] * (len(groups) - 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    model.train()
    recent: list[float] = []
    for batch in task.batches(settings.seed, settings.rows):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        tokengate.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        recent = [*recent[-9:], loss.item()]
    model.eval()
    return sum(recent) / len(recent)


def _scaled(task: Task, model: nn.Module, scale: float) -> dict[str, float]:
    """The same with M(x) smaller at test."""

    def everywhere(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.full(shape, scale)

    with tokengate.restrict(model, everywhere):
        scores = {part: task.score(model, part) for part in PARTS}
    drift = tokengate.drift(model, task.own, measure="kl", scale=scale)
    return {"scale": scale, **scores, "drift": float(drift)}
