"""What took hold of a model's parameters or code, and so stands in the way of changing it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tokengate.errors import TokenGateError
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import all_layers
from tokengate.names import with_wrappers
from tokengate.sharding import is_sharded

# Wrappers that took hold of the model's parameters or code, by class name, because importing
# them would cost what most users do not use.
_WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile",
}
# Those that gather parameters, or reduce their gradients, as they found them.
_HOLDING = ("DistributedDataParallel", "FSDP", "fully_shard")


def check_can_patch(model: nn.Module, caller: str) -> None:
    """An error, which names the function that was called, if nothing may be patched now."""
    if not isinstance(model, nn.Module):
        raise TokenGateError(
            f"{caller} was given a {type(model).__name__}: pass a torch.nn.Module."
        )
    if torch.is_inference_mode_enabled():
        raise TokenGateError(
            f"{caller} was called under torch.inference_mode, where new parameters can never be "
            "trained: patch outside of it."
        )
    for name, wrapper in wrapped(model):
        raise TokenGateError(
            f"{name!r} is wrapped by {wrapper} already, which would not see new parameters: patch "
            "first, then wrap."
        )


def check_can_fold(model: nn.Module) -> None:
    """An error if nothing may be folded now."""
    patched = all_layers(model)
    for name, layer in patched.items():
        if not layer._enabled:
            raise TokenGateError(
                f"fold was called while {name!r} is disabled, where W0 has to stay in place: call "
                "it outside of tokengate.disabled."
            )
    for name, wrapper in (*wrapped(model), *_sharded(patched)):
        raise TokenGateError(
            f"fold found {name!r} wrapped by {wrapper}, which holds on to what fold takes "
            "out: fold a model that is not wrapped, and wrap it then."
        )


def check_can_unpatch(model: nn.Module, patched: dict[str, Gated]) -> None:
    """An error if nothing may be unpatched now."""
    held = (each for each in wrapped(model) if each[1] in _HOLDING)
    for name, wrapper in (*held, *_sharded(patched)):
        raise TokenGateError(
            f"{name!r} is wrapped by {wrapper}, which would go on to wait for the parameters that "
            "unpatch takes out: unpatch a model that is not wrapped, or use disabled()."
        )


def wrapped(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What in `model` is wrapped, by name, and by what."""
    for name, module in with_wrappers(model):
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                yield name or "the model", _WRAPPERS[base.__name__]


def _sharded(patched: dict[str, Gated]) -> Iterator[tuple[str, str]]:
    """The layers in a part of what is sharded as a whole, in the same form."""
    for name, layer in patched.items():
        own = () if layer.modification is None else layer.modification.parameters()
        if any(is_sharded(p) for p in own):
            yield name or "the layer", "fully_shard"
