"""Every patched layer must be called, and trained: the silent no-op is what this library fears."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError, UnreachedLayerWarning
from tokengate.layers.batches import keeping_modes
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import layers, require_layers
from tokengate.layers.sliced_linear import Sliced
from tokengate.linears.accelerate_hooks import check_trainable
from tokengate.linears.experts import is_expert
from tokengate.names import submodule

_SHOWN = 5


def watch(model: nn.Module) -> None:
    """Warn after the first complete forward of `model` if it did not reach every patched layer."""
    if _report_once not in model._forward_hooks.values():
        model.register_forward_hook(_report_once)


def unwatch(model: nn.Module) -> None:
    """Take back what `watch` did."""
    # By value: a copied or unpickled model has the hook, and no handle.
    for key, hook in list(model._forward_hooks.items()):
        if hook is _report_once:
            del model._forward_hooks[key]


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run `model(*args, **kwargs)` and raise unless every patched layer is reached and trained.

    Three forwards: in evaluation without gradients, where fast paths are taken, in evaluation with
    them, and in training; and a backward from the output's `loss` if it has one, else from its
    `logits`, else from the sum of all that is floating-point in it. Every layer must be called in
    each of them, and each of its trainable parameters must be given a gradient:
    DistributedDataParallel fails on those that are not. Experts, which may get no token, are
    exempt. Afterwards parameters, gradients, buffers, modes and random states are as before.

    Args:
        model: a patched model.
        *args: what its forward takes.
        **kwargs: what its forward takes.

    Raises:
        TokenGateError: a layer is not reached, a parameter gets no gradient, or what is trained was
            offloaded.
    """
    patched = {n: m for n, m in require_layers(model, "verify").items() if not is_expert(n)}
    check_trainable(model)
    with _as_it_was(model):
        for training, gradients in ((False, False), (False, True), (True, True)):
            mode = "training" if training else "evaluation"
            mode += "" if gradients else " without gradients"
            model.train(training)
            for layer in patched.values():
                layer._reached = False
            with torch.set_grad_enabled(gradients):
                output = model(*args, **kwargs)
            missed = [name for name, layer in patched.items() if not layer._reached]
            if missed:
                raise TokenGateError(f"in {mode}, {_unreached(model, missed)}.")
            if gradients:
                model.zero_grad(set_to_none=True)
                outputs = [t for t in _tensors(output) if t.requires_grad]
                if outputs:
                    torch.autograd.backward([t.float().sum() for t in outputs])
                _check_gradients(patched, mode)


def _report_once(model: nn.Module, args: Any, output: Any) -> None:
    # A compiled forward keeps no state, so that there is nothing to report.
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        check_trainable(model)
    unwatch(model)
    missed = [n for n, m in layers(model).items() if not m._reached and not is_expert(n)]
    if missed:
        warnings.warn(
            f"in the first forward of this {type(model).__name__}, {_unreached(model, missed)}.",
            UnreachedLayerWarning,
            stacklevel=3,
        )


def _unreached(model: nn.Module, names: list[str]) -> str:
    reason = (
        "either the forward took another branch (call the model as in training), or their owners "
        "read the weight without calling the layer, so that they would never be modified"
    )
    owners = {type(_owner(model, name)).__name__ for name in names if name}
    inside = f" of {', '.join(sorted(owners))}" if owners else ""
    return (
        f"{_listed(names)}{inside} {'was' if len(names) == 1 else 'were'} patched but never "
        f"called: {reason}; name other targets, or exclude these"
    )


def _owner(model: nn.Module, name: str) -> nn.Module:
    """What should have called the layer; of a slice, its fused layer."""
    parent = name.rpartition(".")[0]
    owner = submodule(model, parent)
    return _owner(model, parent) if parent and isinstance(owner, Sliced) else owner


def _check_gradients(patched: dict[str, Gated], mode: str) -> None:
    missing = [
        f"{name}.{own}" if name else own
        for name, layer in patched.items()
        for own, parameter in layer.named_parameters()
        if own.startswith(("modification.", "gate."))
        and parameter.requires_grad
        and parameter.grad is None
    ]
    if missing:
        raise TokenGateError(
            f"in {mode}, {_listed(missing)} got no gradient: the output does not depend on the "
            "layer, as with LLaVA's last vision layer, so exclude it."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a forward returned, however nested."""
    for key in ("loss", "logits"):
        if isinstance(output, dict) and isinstance(output.get(key), Tensor):
            output = output[key]
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    parts: Iterable[Any] = ()
    if isinstance(output, dict):
        parts = output.values()
    elif isinstance(output, (list, tuple)):
        parts = output
    elif dataclasses.is_dataclass(output):  # and no other object: a cache is no output
        parts = vars(output).values()
    for part in parts:
        yield from _tensors(part)


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Whatever is done in this context to a model but to its parameters' values is undone."""
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    reached = {layer: layer._reached for layer in layers(model).values()}
    watched = _report_once in model._forward_hooks.values()
    unwatch(model)
    devices = [t.device for t in gradients if t.device.type == "cuda"]
    try:
        with keeping_modes(model), torch.random.fork_rng(devices=set(devices)):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for layer, flag in reached.items():
            layer._reached = flag
        if watched:
            watch(model)
