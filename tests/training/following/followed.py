"""A model whose taus follow an optimiser, and where the paper's rule leads them."""

import reference
import torch
from models import Net, away_from_initialisation

import tokengate

S = 1e-3


def made(method="lora", **options):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj", "v_proj"], method, penalty=1e-3, **options)
    return away_from_initialisation(model, 0.3)


def taus_of(model):
    return [layer.gate.tau for layer in tokengate.layers(model).values()]


def numbers(model):
    return torch.cat([tau.detach().clone() for tau in taus_of(model)])


def without(model, lr=1e-2):
    return tokengate.param_groups(model, lr)[:1]


def matrices(model):
    return [p for p in without(model)[0]["params"] if p.dim() == 2]


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(2, 5, 8, generator=generator)).square().mean()


def train(model, optimizer, steps=6, after=lambda: None):
    """Where the paper's rule leads from the gradients there were, beside where the taus went."""
    directions = [[] for _ in taus_of(model)]
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for seen, tau in zip(directions, taus_of(model), strict=True):
            seen.append(-tau.grad.item())
        optimizer.step()
        after()
    return torch.tensor([reference.tau_adam(0.0, g, S)[-1] for g in directions])


def near(model, wanted):
    return torch.allclose(numbers(model), wanted.float(), rtol=1e-5, atol=1e-8)
