"""PEFT's adapters: their matrices are none to be patched, they are put around nothing patched, and
what freezes one that is in training says so.

PEFT is known by the names of its classes, because importing it would cost what many do not use.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from tokengate.errors import FrozenAdapterWarning, TokenGateError, listed
from tokengate.layers.patched import all_layers
from tokengate.linears.by_name import is_from
from tokengate.names import named_parameters


def parts_of_adapters(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Of these modules those that PEFT adapted, and what it put there; not the layers beneath."""
    found: set[nn.Module] = set()
    for module in modules:
        if is_from(module, "peft", "BaseTunerLayer"):
            beneath = module._modules.get("base_layer")
            found |= {*module.modules()} - (set() if beneath is None else {*beneath.modules()})
    return found


@contextlib.contextmanager
def telling_of_frozen(model: nn.Module) -> Iterator[None]:
    """Warn of what PEFT's modules had in training before this context and not after it."""
    theirs = (m for m in model.modules() if type(m).__module__.startswith("peft."))
    ids = {id(p) for each in theirs for p in each.parameters()}
    trained = {n: p for n, p in named_parameters(model) if p.requires_grad and id(p) in ids}
    yield
    frozen = [name for name, parameter in trained.items() if not parameter.requires_grad]
    if frozen:
        warnings.warn(
            f"patch freezes {listed(map(repr, frozen))}, which PEFT had in training: name what is "
            'to be trained along in train=, of LoRA train=["lora_A", "lora_B"], or, where it is '
            "trained to its end, call model.merge_and_unload() and patch what that returns.",
            FrozenAdapterWarning,
            stacklevel=6,
        )


@cache
def refuse_around_patched() -> None:
    """From the first patched layer on: PEFT freezes what it is put around, which trains nothing.

    torch tells of each module that is made another's child, and PEFT's take the model so before
    they change anything in it; no other sign is left once they have.
    """
    register_module_module_registration_hook(_refuse)


def _refuse(owner: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is None or not type(owner).__module__.startswith("peft."):
        return
    patched = next(iter(all_layers(child)), None)
    if patched is not None:
        raise TokenGateError(
            f"PEFT's {type(owner).__name__} was asked for around a model whose layer {patched!r} "
            "tokengate has patched, which it would freeze: leave PEFT out (get_peft_model, "
            "peft_config=), as the model has its adapters, or call tokengate.unpatch(model) first."
        )
