"""A schedule closes its share of what was held out, after real trainings of any kind.

`test_sparsity_schedule.py` simulates how scores grow; here they do as they do.
"""

import itertools
import math
import random

import pytest
import torch
from torch import nn

import tokengate
from tokengate.errors import UnreachedSparsityWarning

pytestmark = pytest.mark.usefixtures("one_thread")


def net(hidden):
    sizes = [12, *[24] * hidden]
    pairs = itertools.pairwise(sizes)
    blocks = [part for k, d in pairs for part in (nn.Linear(k, d), nn.Tanh())]
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
        p.copy_(own.detach() * (1 + 0.5 * torch.randn(own.shape, generator=generator)))
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
    "target": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "steps": [20, 40, 60],
    "batch": [(8, 30), (4, 60), (16, 15), (16, 30)],
    "rank": [4, 8, 16],
    "noise": [0.0, 1.0, 3.0],
    "lr": [1e-3, 3e-3, 1e-2],
    "decays": [False, True],
    "gate": ["threshold", "firm", "fisher"],
    "method": ["lora", "dora", "adalora", "adapter"],
    "hidden": [1, 2, 3],
    "dropout": [0.0, 0.1],
    "per_layer": [False, True],
}


@pytest.mark.parametrize("seed", range(6))
def test_within_003_of_the_target(seed):
    """From 240 positions a layer and step on that are drawn by themselves."""
    generator = random.Random(seed)
    case = {name: generator.choice(values) for name, values in DRAWN.items()}
    assert abs(trained(**case, seed=seed) - case["target"]) <= 0.03


def test_with_dropout_too():
    """The thresholds were those of dropped inputs: +.032 here."""
    found = trained(0.5, 60, batch=(16, 60), gate="fisher", rank=8, dropout=0.3, seed=1)
    assert abs(found - 0.5) <= 0.03


def test_adalora_of_two_layers_in_sixty_steps():
    """P and Q become orthogonal meanwhile, so that sizes grow a hundredfold: .026 too many."""
    misses = [
        trained(0.5, 60, method="adalora", rank=8, lr=lr, noise=noise, seed=seed) - 0.5
        for seed, (lr, noise) in enumerate([(1e-2, 0.0), (3e-3, 1.0)])
    ]
    assert max(map(abs, misses)) <= 0.03


def test_the_nearest_share_where_m_is_0_at_many_positions():
    """ReLU of a single hidden unit: none was closed though more were nearer."""
    with pytest.warns(UnreachedSparsityWarning, match="to close 35% .* with (4|5)[0-9]%"):
        found = trained(0.35, 30, method="adapter", rank=1, batch=(16, 30), seed=3)
    assert 0.4 < found < 0.6
    with pytest.warns(UnreachedSparsityWarning, match="to close 15% .* with 0%"):
        assert trained(0.15, 30, method="adapter", rank=1, batch=(16, 30), seed=3) < 0.1


ENDS = {
    "as it went on": {},
    "a batch of one sample": {"samples": lambda step: 1 if step == 99 else 8},
    "batches of all sizes": {"samples": lambda step: (1, 2, 8, 32)[step % 4]},
    "one large loss": {"weight": lambda step: 30.0 if step == 99 else 1.0},
    "one large loss before": {"weight": lambda step: 30.0 if step == 94 else 1.0},
    "another unit": {"weight": lambda step: 1000.0 if step > 50 else 1.0},
}


@pytest.mark.parametrize("gate", ["fisher", "threshold"])
@pytest.mark.parametrize("end", ENDS)
def test_however_it_ends(end, gate):
    """fisher averaged squares of gradients as they came: .01 to .9 instead of .6."""
    case = {"samples": lambda step: 8, "weight": lambda step: 1.0} | ENDS[end]
    torch.manual_seed(0)
    model, teacher = net(2), net(2).requires_grad_(False)
    tokengate.patch(model, "all-linear", rank=4, gate=gate)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=3e-3))
    tokengate.SparsitySchedule(model, optimizer, 0.6, 100)
    for step in range(100):
        x = torch.randn(case["samples"](step), 30, 12)
        optimizer.zero_grad()
        (case["weight"](step) * (model(x) - teacher(x)).square().mean()).backward()
        optimizer.step()
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model(torch.randn(200, 30, 12))
    assert abs(rec.report().sparsity - 0.6) <= 0.03
