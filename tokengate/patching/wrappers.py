"""What took hold of a model's parameters or code, and so stands in the way of changing it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tokengate.errors import TokenGateError
from tokengate.layers.calls import DISABLED, said_of
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import all_layers
from tokengate.linears.by_name import is_from
from tokengate.names import check_module, named_modules, named_parameters, with_wrappers
from tokengate.sharding import in_processes, is_flattened, is_sharded

# Wrappers that took hold of the model's parameters or code, by class name, because importing
# them would cost what most users do not use.
_WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile",
}
# Those that go on without what is new in the model that they hold.
_AROUND = (
    ("torch", "DistributedDataParallel", "DistributedDataParallel"),
    ("deepspeed", "DeepSpeedEngine", "DeepSpeed"),
)
# Those that gather parameters, or reduce their gradients, as they found them.
_HOLDING = ("DistributedDataParallel", "FSDP", "fully_shard")


def check_can_patch(model: nn.Module, caller: str) -> None:
    """An error, which names the function that was called, if nothing may be patched now."""
    check_module(caller, model)
    if torch.is_inference_mode_enabled():
        raise TokenGateError(
            f"{caller} was called under torch.inference_mode, where new parameters can never be "
            "trained: patch outside of it."
        )
    for name, parameter in named_parameters(model):
        if is_lazy(parameter):
            raise TokenGateError(
                f"{caller} found {name!r}, which has no values yet: run the model once, then patch."
            )
    for name, wrapper in (*wrapped(model), *_wrapped_around(model)):
        raise TokenGateError(
            f"{name!r} is wrapped by {wrapper} already, which would not see new parameters: patch "
            "first, then wrap."
        )


def check_can_fold(model: nn.Module) -> None:
    """An error if nothing may be folded now."""
    patched = all_layers(model)
    for name, layer in patched.items():
        if said_of(layer, DISABLED):
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


def check_gathered(
    model: nn.Module,
    caller: str,
    remedy: str = "pass what FSDP made, on every process, within "
    "FullyShardedDataParallel.summon_full_params(model)",
) -> None:
    """An error if FSDP1 holds in pieces now what is patched or trained in `model`.

    Its parameters are pieces of any shape, or none, but within its `summon_full_params`; which of
    the two is known to its wrapper alone.
    """
    whole: set[nn.Module] = set()
    for _, module in with_wrappers(model):
        if _is_torch(module, "FullyShardedDataParallel"):
            state = getattr(module.training_state, "name", "")
            inside = set(module.modules())
            whole = whole | inside if state == "SUMMON_FULL_PARAMS" else whole - inside
    parts = (part for m in all_layers(model).values() for part in (m.modification, m.gate))
    own = {module for part in parts if part is not None for module in part.modules()}
    for name, module in named_modules(model):
        trained = any(p is not None and p.requires_grad for p in module._parameters.values())
        if (trained or module in own) and module not in whole and is_flattened(module):
            raise TokenGateError(
                f"{caller} found {name or 'the model'!r} in pieces, into which FSDP divided it: "
                f"{remedy}; fully_shard (FSDP2) needs none of this."
            )


def wrapped(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What in `model` is wrapped, by name, and by what."""
    for name, module in with_wrappers(model):
        for kind, shown in _WRAPPERS.items():
            if _is_torch(module, kind):
                yield name or "the model", shown


def _wrapped_around(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What wraps `model`, or what it is a part of, as `ddp` does of `ddp.module`, likewise.

    A module does not know what holds it. Whoever waits for gradients of others needs a process
    group, so that without one nothing is looked through.
    """
    if not in_processes():
        return
    if any(_holders(model)):
        gc.collect()  # one that is gone stays until then
    for shown in _holders(model):
        yield "the model", shown


def _holders(model: nn.Module) -> Iterator[str]:
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):  # which asks nothing of what stands for another
            for library, kind, shown in _AROUND:
                if is_from(thing, library, kind) and any(m is model for m in thing.modules()):
                    yield shown


def _sharded(patched: dict[str, Gated]) -> Iterator[tuple[str, str]]:
    """The layers in a part of what is sharded as a whole, in the same form."""
    for name, layer in patched.items():
        own = () if layer.modification is None else layer.modification.parameters()
        if any(is_sharded(p) for p in own):
            yield name or "the layer", "fully_shard"
        elif any(is_flattened(module) for module in layer.modules()):
            yield name or "the layer", "FSDP"


def _is_torch(module: nn.Module, kind: str) -> bool:
    return is_from(module, "torch", kind)
