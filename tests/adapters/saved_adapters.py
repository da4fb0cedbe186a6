"""Adapters to save, what to compare them by, and folders with other things in them."""

import hashlib
import json

import torch
from models import Net, away_from_initialisation, one_sentence, snapshot
from safetensors.torch import load_file, save_file

import tokengate

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def trained(method="lora", model=None, targets=("q_proj", "fc1"), **options):
    """A patched model whose gates are partly open."""
    torch.manual_seed(3)
    model = model or Net()
    tokengate.patch(model, list(targets), method=method, penalty=0.25, **options)
    away_from_initialisation(model)
    for layer in tokengate.layers(model).values():
        if layer.gate is not None:
            layer.gate.tau.data.fill_(0.4)
    return model


def fresh():
    torch.manual_seed(3)
    return Net()


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit(folder, **changes):
    """Other fields in the configuration, ours or PEFT's."""
    (path,) = folder.glob("*_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    """Other tensors in adapter_model.safetensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refused(model, folder, *words, **options):
    """The one sentence that load answers, having touched nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # away from the saved values, which would not be seen to be loaded
    before = snapshot(model)
    with one_sentence(*words) as text:
        tokengate.load(model, folder, **options)
    assert snapshot(model) == before
    return text[0]


def forge(folder, change):
    """Another configuration, with the digests and the metadata that fit it."""
    path, weights = folder / "tokengate_config.json", folder / "adapter_model.safetensors"
    config = json.loads(path.read_text())
    del config["sha256"]
    change(config)
    save_file(load_file(weights), weights, {"tokengate": json.dumps(config), "previous": ""})
    config["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    path.write_text(json.dumps(config))
