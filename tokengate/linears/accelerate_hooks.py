"""Accelerate's hooks, which stand on a layer's instance between its caller and its class's forward.

`device_map` over several devices and offloading put `forward` on the instance and keep the bound
method that was there in `_old_forward`, so that a layer with a new class would still run the old
code. They are known by their attributes, because importing their library would cost what most
users do not use.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from tokengate.errors import TokenGateError
from tokengate.names import named_modules

# Where a bound forward may be kept: `forward` itself, once a hook was removed again.
_HELD = ("forward", "_old_forward")


def hides_class(module: nn.Module) -> bool:
    """Whether a forward on the instance would keep that of a new class from running.

    Accelerate's hook around the class's own forward would not, since `reroute` leads it there.
    """
    held = module.__dict__
    if "forward" not in held or held["forward"] == _bound(module, type(module)):
        return False
    hooked = (
        "_hf_hook" in held
        and isinstance(held["forward"], functools.partial)
        and str(held["forward"].func.__module__).startswith("accelerate.")
    )
    return not (hooked and held.get("_old_forward") == _bound(module, type(module)))


def reroute(module: nn.Module, before: type[nn.Module]) -> None:
    """Let what a hook keeps of the class `before` be the forward of the class of today."""
    for name in _HELD:
        if module.__dict__.get(name) == _bound(module, before):
            module.__dict__[name] = _bound(module, type(module))


def _bound(module: nn.Module, kind: type[nn.Module]) -> MethodType:
    return MethodType(kind.forward, module)


@contextlib.contextmanager
def weights_present(module: nn.Module) -> Iterator[None]:
    """Within this context an offloaded module has its weights, on the device that it runs on.

    A layer whose weights are views of another module's says so by an attribute `weight_holder`.
    """
    module = getattr(module, "weight_holder", module)
    if not is_offloaded(module):
        yield
        return
    offloaded = dict(module._parameters), dict(module._buffers)
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
        # The objects too: nothing has been changed yet.
        module._parameters.update(offloaded[0])
        module._buffers.update(offloaded[1])


def is_offloaded(module: nn.Module) -> bool:
    """Whether its own hook takes its weights away between calls."""
    return any(_says(hook, "offload") for hook in _hooks(module))


def offloaded_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that are replaced by others in every forward."""
    return {
        id(parameter)
        for module in model.modules()
        for hook in _hooks(module)
        if _says(hook, "offload")
        for parameter in module.parameters(recurse=_says(hook, "place_submodules"))
    }


def offloaded_whole(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that are loaded and offloaded by one around them, and that one's name."""
    return {
        inside: name
        for name, module in named_modules(model)
        for hook in _hooks(module)
        if _says(hook, "offload") and _says(hook, "place_submodules")
        for inside in module.modules()
    }


def check_resident(part: nn.Module) -> None:
    """An error if `part` of a patched layer was itself offloaded, after patching."""
    if is_offloaded(part):
        raise _offloaded_too()


def check_trainable(model: nn.Module) -> None:
    """An error if what is trained in `model` is replaced by other objects in every forward."""
    offloaded = offloaded_parameters(model)
    if any(p.requires_grad and id(p) in offloaded for p in model.parameters()):
        raise _offloaded_too()


def _offloaded_too() -> TokenGateError:
    return TokenGateError(
        "a patched model was offloaded together with its modifications, which could then not be "
        "trained: remove the hooks (`remove_hook_from_submodules`), unpatch, offload, and patch "
        "then."
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _says(hook: Any, flag: str) -> bool:
    return getattr(hook, flag, False) is True
