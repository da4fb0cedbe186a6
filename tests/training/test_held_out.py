"""A schedule closes its share of what was held out, after real trainings of any kind.

`test_sparsity_schedule.py` simulates how scores grow; here they do as they do.
"""

import itertools
import math

import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tokengate


def net(hidden):
    sizes = [12, *[24] * hidden]
    blocks = [part for k, d in itertools.pairwise(sizes) for part in (nn.Linear(k, d), nn.Tanh())]
    return nn.Sequential(*blocks, nn.Linear(24, 5))


def trained(
    target, steps, *, batch=(8, 30), rank=4, noise=1.0, lr=1e-3, decays=False, gate="threshold",
    method="lora", hidden=1, dropout=0.0, alike=0.0, seed=0, **options,
):  # fmt: skip
    """The share that is closed of many positions that the training has not seen.

    Of the inputs' variance `alike` is shared by the positions of a sample.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    model, teacher = net(hidden), net(hidden).requires_grad_(False)
    for p, own in zip(teacher.parameters(), model.parameters(), strict=True):
        p.copy_(own + 0.3 * own.abs().mean() * torch.randn(own.shape, generator=generator) * own)
    tokengate.patch(model, "all-linear", method, rank=rank, gate=gate, dropout=dropout)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=lr))
    tokengate.SparsitySchedule(model, optimizer, target, steps, **options)
    curve = (lambda s: 0.5 * (1 + math.cos(math.pi * s / steps))) if decays else lambda s: 1.0
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, curve)

    def drawn(samples, length):
        x = torch.randn(samples, length, 12, generator=generator)
        own = torch.randn(samples, 1, 12, generator=generator)
        return x * (1 - alike) ** 0.5 + own * alike**0.5

    for _ in range(steps):
        x = drawn(*batch)
        y = teacher(x)
        y = y + noise * torch.randn(y.shape, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        if method == "adalora":
            loss = loss + 0.1 * tokengate.orthogonality(model)
        loss.backward()
        optimizer.step()
        rate.step()
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model(drawn(600, 30))
    return rec.report().sparsity


DRAWN = {
    "target": st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    "steps": st.sampled_from([20, 40, 60, 100, 140]),
    "batch": st.sampled_from([(8, 30), (4, 60), (16, 15), (32, 30)]),
    "rank": st.sampled_from([4, 8, 16]),
    "noise": st.sampled_from([0.0, 1.0, 3.0]),
    "lr": st.sampled_from([1e-3, 3e-3, 1e-2]),
    "decays": st.booleans(),
    "gate": st.sampled_from(["threshold", "firm", "fisher"]),
    "method": st.sampled_from(["lora", "dora", "adalora", "adapter"]),
    "hidden": st.sampled_from([1, 2, 3]),
    "dropout": st.sampled_from([0.0, 0.1]),
    "per_layer": st.booleans(),
    "seed": st.integers(0, 50),
}


@settings(max_examples=many(12))
@given(**DRAWN)
def test_within_003_of_the_target(target, **training):
    """From 240 positions a layer and step on that are drawn by themselves."""
    assert abs(trained(target, **training) - target) <= 0.03
