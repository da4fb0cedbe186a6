"""Trainings that a schedule leads, for the tests of its end and of what it is told by."""

import torch
from torch import nn

import tokengate

STEPS = 24


class Net(nn.Module):
    """With what is otherwise in training than in evaluation."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(dropout)

    def forward(self, x, *, scale=1.0, more=None):
        hidden = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.last(self.dropout(hidden.tanh())) * scale


def made(make=Net, steps=STEPS, optimizer=torch.optim.AdamW, then=lambda model: model, **options):
    torch.manual_seed(0)
    model = make()
    tokengate.patch(model, "all-linear", rank=4)
    model = then(model)
    optimizer = optimizer(tokengate.param_groups(model, lr=1e-2))
    return model, optimizer, tokengate.SparsitySchedule(model, optimizer, 0.5, steps, **options)


def given(step, size=16):
    return torch.randn(size, 10, 6, generator=torch.Generator().manual_seed(step))


def trained(call=lambda model, x, step: model(x), steps=STEPS, make=Net, begin=0, **options):
    model, optimizer, schedule = made(make, steps, **options)
    train(model, optimizer, call, steps, begin)
    return model, schedule


def train(model, optimizer, call, steps=STEPS, begin=0):
    for step in range(begin, steps):
        optimizer.zero_grad()
        (call(model, given(step), step) - 1).square().mean().backward()
        optimizer.step()


def closed(model):
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model(given(-1, size=1000))
    return rec.report().sparsity


def thresholds(*args, **options):
    return list(trained(*args, **options)[1].thresholds.values())


def is_led(model):
    return any(layer.gate.is_led for layer in tokengate.layers(model).values())
