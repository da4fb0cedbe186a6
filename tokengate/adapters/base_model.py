"""What an adapter says of its base: which model it is, and what in it must be the same elsewhere.

Names and shapes of linear layers, and samples of the values of what is frozen and may be random:
what the base's checkpoint lacked, and its head; and of running means, which a training moves, as
BatchNorm's, and no adapter has. An adapter is worth nothing beside other ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokengate.adapters.config import SampleConfig
from tokengate.adapters.weights import DTYPES, NAMES
from tokengate.layers.patched import layers
from tokengate.linears.class_swap import own_class
from tokengate.linears.linear_like import LinearLike, features_of, is_linear
from tokengate.names import inside, joined, named_modules, named_parameters
from tokengate.patching.heads import head, new_parameters
from tokengate.sharding import gathered, is_absent, is_flattened, is_sharded

# Of each parameter, so many values, from its first to its last.
_SAMPLED = 64
# What normalising layers of torch call the mean that they keep of what they have seen.
RUNNING = "running_mean"


def class_name(model: nn.Module) -> str:
    """The class of the model under our own and what wraps it, with its module."""
    kind = own_class(inside(model))
    return f"{kind.__module__}.{kind.__qualname__}"


def origin(model: nn.Module) -> tuple[str, str]:
    """The name by which Hugging Face's libraries loaded the model or a part of it, and its commit.

    Both are empty where they are not known, the commit also where it was a folder.
    """
    for _, module in named_modules(model):
        config = getattr(module, "config", None)
        name = _entry(config, "_name_or_path")
        if name:
            return name, _entry(config, "_commit_hash")
    return "", ""


def _entry(config: Any, key: str) -> str:
    found = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return found if isinstance(found, str) else ""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names and shapes of the model's linear layers, patched or not."""
    own = {m for layer in layers(model).values() for m in layer.modification.modules()}
    shapes = [
        f"{name} {features_of(cast(LinearLike, m))}"
        for name, m in named_modules(model)
        if is_linear(m) and m not in own
    ]
    return hashlib.sha256("\n".join(sorted(shapes)).encode()).hexdigest()


def samples(model: nn.Module) -> dict[str, SampleConfig]:
    """Some values of each frozen parameter that the checkpoint lacked, or that is of the head.

    And of running means. Every process of a sharded model must call it. What has no values here is
    left out.
    """
    # Which is all that is new, where anything is.
    asked: dict[str, Tensor] = {n: p for n, p in head(model).items() if not p.requires_grad}
    asked |= _running_means(model)
    found = {}
    for name, values in _sampled(model, asked).items():
        listed = values.double().tolist()
        if all(map(math.isfinite, listed)):
            parameter = asked[name]
            found[name] = SampleConfig(NAMES[parameter.dtype], list(parameter.shape), listed)
    return found


def others(
    model: nn.Module, saved: Mapping[str, SampleConfig], given: Collection[str]
) -> list[str]:
    """The names of what is random, or may be, and has other values in `model` than it had.

    Of two dtypes the values may differ by their rounding. What the checkpoint of `model` lacked
    has others, too, if nothing is known of those it had; what is trained, or was `given` by the
    adapter, has its own.
    """
    parameters: dict[str, Tensor] = dict(named_parameters(model, remove_duplicate=False))
    parameters |= _running_means(model)
    new = {name for name, p in new_parameters(model).items() if not p.requires_grad}
    known = {name: parameters[name] for name in saved if name in parameters}
    found = {n for n, p in known.items() if list(p.shape) != saved[n].shape}
    for name, values in _sampled(model, known).items():
        if name not in found and not _same(values, saved[name]):
            found.add(name)
    return sorted((found | (new - known.keys())) - set(given))


def _same(values: Tensor, saved: SampleConfig) -> bool:
    wanted, dtype = torch.tensor(saved.values, dtype=torch.float64), DTYPES.get(saved.dtype)
    if dtype is None or len(values) != len(wanted) or values.dtype == dtype:
        return torch.equal(values.double(), wanted)
    rounding = max(torch.finfo(each).eps for each in (values.dtype, dtype))
    return torch.allclose(values.double(), wanted, rtol=rounding, atol=1e-7)


def _running_means(model: nn.Module) -> dict[str, Tensor]:
    own = ((name, m._buffers.get(RUNNING)) for name, m in named_modules(model))
    return {joined(name, RUNNING): mean for name, mean in own if mean is not None}


def _sampled(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`(n,)` values of each parameter, on the CPU in its dtype."""
    pieces = {
        id(p)
        for _, module in named_modules(model)
        if is_flattened(module)
        for p in module._parameters.values()
    }
    found = {}
    for name, parameter in parameters.items():
        if parameter.is_meta or id(parameter) in pieces or parameter.dtype not in NAMES:
            continue
        if type(parameter.data) is not Tensor and not is_sharded(parameter):
            continue  # quantised, by torchao
        if is_absent(parameter):
            continue  # elsewhere, under ZeRO-3
        flat = gathered(parameter).detach().flatten()
        if not len(flat):
            continue
        places = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), dtype=torch.float64)
        found[name] = flat[places.round().long().to(flat.device)].cpu()
    return found
