"""Three adapters whose layers overlap, each alone."""

import torch
from models import Net, away_from_initialisation

import tokengate

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


# Of each adapter its targets, method and options; they overlap in fc1.
KINDS = {
    "a": (["q_proj", "fc1"], "lora", {"rank": 3}),
    "b": (["fc1", "fc2"], "dora", {"rank": 2}),
    "c": (["v_proj", "fc1"], "adapter", {"rank": 4, "gate": False}),
}


def fresh():
    torch.manual_seed(0)
    return Net()


def alone(name, seed=0):
    """A model with one of them and no other."""
    targets, method, options = KINDS[name]
    model = tokengate.patch(fresh(), targets, method=method, **options)
    torch.manual_seed(ord(name))
    away_from_initialisation(model)
    for layer in tokengate.layers(model).values():
        if layer.gate is not None:
            layer.gate.tau.data.fill_(0.4)
    return model.eval()


def run(model, x=X):
    with torch.no_grad():
        return model(x)
