"""torch's inference fast path, which reads all weights of an encoder layer and calls nothing."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokengate.layers.calls import DISABLED, said_of
from tokengate.layers.gated_linear import Gated
from tokengate.linears.class_swap import Swapped, swap, swap_back


def _closable(name: str, closed: Any) -> Any:
    """The flag `name`, of which a layer has one and a stack another: `closed` where not plain."""

    def found(encoder: nn.Module) -> Any:
        if name not in encoder.__dict__:
            raise AttributeError(name)
        return encoder.__dict__[name] if _is_plain(encoder) else closed

    def put(encoder: nn.Module, value: Any) -> None:
        encoder.__dict__[name] = value

    return property(found, put)


class _Encoder(Swapped):
    """An encoder (layer) whose fast path is closed wherever a patched layer in it is active.

    The fast path differs from the layers' own code by rounding, and it sets the outputs of padded
    positions to 0; with a patched layer both are gone, as in training. Before it leaves its Python
    code, the layer asks the first of these flags, for one fused kernel, and the stack the second,
    for a nested tensor that only this kernel can take. Neither is used for anything else.
    """

    activation_relu_or_gelu = _closable("activation_relu_or_gelu", 0)
    use_nested_tensor = _closable("use_nested_tensor", False)


def _is_plain(encoder: nn.Module) -> bool:
    inside = (module for module in encoder.modules() if isinstance(module, Gated))
    return all(said_of(layer, DISABLED) or layer.in_use() is None for layer in inside)


def settle_fast_paths(model: nn.Module) -> None:
    """Close the fast path of every encoder that holds a patched layer, open all others."""
    for module in list(model.modules()):
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            holds = any(isinstance(inside, Gated) for inside in module.modules())
            if holds and not isinstance(module, _Encoder):
                swap(module, _Encoder)
            elif not holds and isinstance(module, _Encoder):
                swap_back(module)
