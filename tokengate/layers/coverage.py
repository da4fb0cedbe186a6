"""Every patched layer must be called, and trained: the silent no-op is what this library fears."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError, UnreachedLayerWarning, listed
from tokengate.gates.optimizer_steps import is_part, watch_steps
from tokengate.layers.batches import apart, keeping_state
from tokengate.layers.changing import exclusive
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import (
    NAMED,
    ROOTS,
    SEEN,
    all_layers,
    is_root,
    layers,
    lost,
    may_be_idle,
    own_parameters,
    remember,
    require_layers,
    roots,
    what_is_lost,
)
from tokengate.layers.sliced_linear import Sliced
from tokengate.linears.accelerate_hooks import check_trainable
from tokengate.names import joined, submodule


def watch(model: nn.Module) -> None:
    """Warn of patched layers of `model` that are not reached, not trained, or gone.

    After the first complete forward of the model, or of a module in it that is called past it, if
    that did not reach every layer inside, and after the first since a layer got others beside it,
    as a fused projection; at the first step of each optimizer that has their parameters, of those
    without a gradient, however the loss came about; and at the next forward or step after a layer
    was replaced.
    """
    remember(model)
    for module in model.modules():
        if SEEN in module.__dict__:
            module.__dict__[SEEN] = False
    look_anew()


@exclusive
def verify(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run `model(*args, **kwargs)` and raise unless every patched layer is reached and trained.

    Three forwards: in evaluation without gradients, where fast paths are taken, in evaluation with
    them, and in training; and a backward from the output's `loss` if it has one, else from its
    `logits`, else from the sum of all that is floating-point in it. Every layer must be called in
    each of them, and each of its trainable parameters must be given a gradient:
    DistributedDataParallel fails on those that are not. Experts, which may get no token, are
    exempt. Afterwards parameters, gradients, the state_dict's buffers, modes and random states are
    as before.

    Args:
        model: a patched model.
        *args: what its forward takes.
        **kwargs: what its forward takes.

    Raises:
        TokenGateError: a layer is not reached, a parameter gets no gradient, or what is trained was
            offloaded.
    """
    check_present(model, "verify")
    patched = {n: m for n, m in require_layers(model, "verify").items() if not may_be_idle(n, m)}
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


def report_unreached(module: nn.Module) -> None:
    """Warn, once, of patched layers inside that a forward of `module`, which ends, missed."""
    # A compiled forward keeps no state, so that there is nothing to report.
    if module.__dict__[SEEN] or torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        check_trainable(module)
    module.__dict__[SEEN] = True
    compiled = [inside for inside in module.modules() if _is_compiled(inside)]
    unseen = {layer for inside in compiled for layer in inside.modules()}
    seen = {n: m for n, m in layers(module).items() if m not in unseen and not may_be_idle(n, m)}
    missed = [name for name, layer in seen.items() if not layer._reached]
    if missed:
        warnings.warn(
            f"in the first forward of this {type(module).__name__}, {_unreached(module, missed)}.",
            UnreachedLayerWarning,
            stacklevel=8,
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether it runs as compiled code, which says nothing of the layers in it."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def report_lost(model: nn.Module) -> None:
    """Warn, once, of patched layers that are gone from `model`."""
    for root in roots(model):
        report_lost_of(root)


def report_lost_of(root: nn.Module, stacklevel: int = 6) -> None:
    """The same of one module, if it was given to `patch`; by default at a step, or `record`."""
    if torch.compiler.is_compiling() or not is_root(root):
        return
    ROOTS.add(root)  # one that was copied or unpickled
    names = lost(root)
    if names != root.__dict__.get(NAMED, []):
        root.__dict__[NAMED] = names
        if names:
            warnings.warn(f"{what_is_lost(root)}.", UnreachedLayerWarning, stacklevel=stacklevel)


def check_present(model: nn.Module, asked: str) -> None:
    """An error, which names the function that was called, if patched layers are gone."""
    for root in roots(model):
        found = what_is_lost(root)
        if found is not None:
            raise TokenGateError(f"{asked} found that {found}.")


# Of each optimizer: which parameters and models there were when it was looked at, and the layers of
# each model that it trains, {id of a parameter: name}.
_OF_OPTIMIZER: WeakKeyDictionary[Any, tuple[Any, list[Any]]] = WeakKeyDictionary()
# The models whose gradients were looked at there; and the first optimizer of each model.
_LOOKED_AT: WeakKeyDictionary[Any, WeakSet[nn.Module]] = WeakKeyDictionary()
_FIRST: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
# Of each model: {id of a parameter of a layer's: the layer's name}.
_OWN: WeakKeyDictionary[nn.Module, dict[int, str]] = WeakKeyDictionary()


def look_anew() -> None:
    """Layers have other parameters than before."""
    _OWN.clear()
    _OF_OPTIMIZER.clear()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not ROOTS or is_part(optimizer, kwargs):
        return
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    seen = _LOOKED_AT.setdefault(optimizer, WeakSet())
    for reference, own in _models_of(optimizer, held):
        model = reference()
        if _FIRST.setdefault(model, ref(optimizer))() in (optimizer, None):
            _FIRST[model] = ref(optimizer)
            report_lost_of(model)
        # A step without any gradient, as before a training begins, tells nothing.
        told = model in seen or all(p.grad is None for p in held.values())
        if not told and _report_untrained(model, optimizer, own, held):
            seen.add(model)


def _models_of(optimizer: Any, held: Collection[int]) -> list[tuple[Any, dict[int, str]]]:
    key = (frozenset(held), frozenset(id(root) for root in list(ROOTS)))
    known = _OF_OPTIMIZER.get(optimizer)
    if known is None or known[0] != key:
        found = []
        for root in list(ROOTS):
            if root not in _OWN:
                _OWN[root] = {
                    p: name
                    for name, layer in all_layers(root).items()
                    for p in own_parameters([layer])
                    if not may_be_idle(name, layer)
                }
            own = {p: _OWN[root][p] for p in held if p in _OWN[root]}
            if own:
                found.append((ref(root), own))
        known = _OF_OPTIMIZER[optimizer] = (key, found)
    return known[1]


def _report_untrained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    own: dict[int, str],
    held: dict[int, nn.Parameter],
) -> bool:
    """Whether all of its layers could be looked at: nobody has frozen one."""
    trained: dict[str, bool] = {}
    frozen = set()
    for key, name in own.items():
        parameter = held[key]
        if not parameter.requires_grad:
            frozen.add(name)
        elif parameter.numel():
            trained[name] = trained.get(name, False) or parameter.grad is not None
    patched = all_layers(model)
    missed = [name for name in patched if not trained.get(name, True)]
    if missed:
        reached = [name for name in missed if patched[name]._reached]
        why = _untrained(reached) if reached else _unreached(model, missed)
        warnings.warn(
            f"at the first step of this {type(optimizer).__name__}, {why}.",
            UnreachedLayerWarning,
            stacklevel=6,
        )
    return bool(missed) or not frozen - trained.keys()


def _untrained(names: list[str]) -> str:
    return (
        f"{listed(map(repr, names))} got no gradient: either the loss does not depend on the "
        "layer, as on LLaVA's last vision layer, so exclude it; or it ran without gradients, as in "
        "reentrant checkpointing whose inputs require none, so pass use_reentrant=False, or call "
        "model.enable_input_require_grads()"
    )


def _unreached(model: nn.Module, names: list[str]) -> str:
    reason = (
        "either the forward took another branch (call the model as in training), or their owners "
        "read the weight without calling the layer, so that they would never be modified"
    )
    owners = {type(_owner(model, name)).__name__ for name in names if name}
    inside = f" of {', '.join(sorted(owners))}" if owners else ""
    were = "was" if len(names) == 1 else "were"
    which = f"{listed(map(repr, names))}{inside} {were}"
    return f"{which} patched but never called: {reason}; name other targets, or exclude these"


def _owner(model: nn.Module, name: str) -> nn.Module:
    """What should have called the layer; of a slice, its fused layer."""
    parent = name.rpartition(".")[0]
    owner = submodule(model, parent)
    return _owner(model, parent) if parent and isinstance(owner, Sliced) else owner


def _check_gradients(patched: dict[str, Gated], mode: str) -> None:
    missing = [
        joined(name, f"{part}.{own}")
        for name, layer in patched.items()
        for part, module in (("modification", layer.modification), ("gate", layer.gate))
        if module is not None
        for own, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if missing:
        raise TokenGateError(f"in {mode}, {_untrained(missing)}.")


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
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    reached = {layer: layer._reached for layer in layers(model).values()}
    unseen = [module for module in model.modules() if module.__dict__.get(SEEN) is False]
    for module in unseen:
        module.__dict__[SEEN] = True
    try:
        with keeping_state(model, most=math.inf), apart(model):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for layer, flag in reached.items():
            layer._reached = flag
        for module in unseen:
            module.__dict__[SEEN] = False


watch_steps(after=_after_step)
