"""Patched layers and models whose modifications are restricted, and where."""

import torch
from models import Net, away_from_initialisation
from torch import nn

import tokengate

MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]], dtype=torch.bool)


def net(gate="threshold", method="lora", targets=("q_proj", "fc1"), **options):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), list(targets), method, rank=2, gate=gate, **options)
    return away_from_initialisation(model)


def layer_of(method="lora", gate="threshold", dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=bias).to(dtype)
    tokengate.patch(layer, "all-linear", method, rank=3, gate=gate)
    return away_from_initialisation(layer)
