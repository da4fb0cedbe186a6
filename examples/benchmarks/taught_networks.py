"""Small networks that learn the outputs of others like them, while a schedule closes a share."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import tokengate


def network(hidden: int) -> nn.Sequential:
    """12 inputs, so many hidden layers of width 24, and 5 outputs."""
    widths = pairwise([12, *[24] * hidden])
    parts = [part for k, d in widths for part in (nn.Linear(k, d), nn.Tanh())]
    return nn.Sequential(*parts, nn.Linear(24, 5))


def taught(
    make: Callable[[], nn.Module], draw: Callable[[int], Tensor], generator: torch.Generator,
    target: float, steps: int, *, samples: int, noise: float, lr: float, decays: bool,
    method: str, rank: int, gate: str, dropout: float, **options: Any,
) -> nn.Module:  # fmt: skip
    """One that `make` makes, all of whose layers were adapted in so many steps.

    Args:
        make: called twice; the second one is changed and teaches the first.
        draw: the inputs of so many samples.
        generator: of the teacher's change and of the noise on what it says.
        target: of the schedule, which has the `options`, too.
        decays: whether the learning rate does.
        method: as in `patch`; so are `rank`, `gate` and `dropout`.
    """
    model, teacher = make(), make().requires_grad_(False)
    for p, own in zip(teacher.parameters(), model.parameters(), strict=True):
        p.copy_(own.detach() * (1 + 0.5 * torch.randn(own.shape, generator=generator)))
    targets = [name for name, part in model.named_modules() if hasattr(part, "weight")]
    tokengate.patch(model, targets, method, rank=rank, gate=gate, dropout=dropout)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=lr))
    tokengate.SparsitySchedule(model, optimizer, target, steps, **options)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)) if decays else 1.0
    )
    for _ in range(steps):
        x = draw(samples)
        y = teacher(x)
        y = y + noise * torch.randn(y.shape, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        if method == "adalora":
            loss = loss + 0.1 * tokengate.orthogonality(model)
        loss.backward()
        optimizer.step()
        rate.step()
    return model


def closed(model: nn.Module, x: Tensor) -> float:
    """The share of the positions of x that its gates close."""
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model(x)
    return rec.report().sparsity
