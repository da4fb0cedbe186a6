"""The command as a user runs it, and adapters to run it on."""

import torch
from models import Net, away_from_initialisation

import tokengate
from tokengate.command_line import main


def run(capsys, *arguments):
    """What it printed; it must have gone well and warned of nothing."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *arguments):
    """The one sentence on stderr, after which nothing is printed."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tokengate {arguments[0]}: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


def saved(folder, method="lora", taus=(0.1, 0.2, 0.3, -0.5), seed=0, train=(), **options):
    torch.manual_seed(seed)
    model = tokengate.patch(Net(), ["q_proj", "fc1"], method, train=train, **options)
    away_from_initialisation(model)
    for layer, tau in zip(tokengate.layers(model).values(), taus, strict=False):
        if layer.gate is not None:
            layer.gate.tau.data.fill_(tau)
    tokengate.save(model, folder)
    return model
