"""torch's inference fast path, which reads all weights of an encoder layer and calls nothing."""

from __future__ import annotations

from torch import nn

from tokengate.layers.gated_linear import Gated

# What each of them asks before it leaves its Python code: the layer for one fused kernel, the stack
# for a nested tensor that only this kernel can take. Neither is used for anything else.
_FLAGS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
# On an encoder (layer) whose fast path is closed: what its flag was.
_BEFORE = "_tokengate_fast_path"


def settle_fast_paths(model: nn.Module) -> None:
    """Close the fast path of every encoder that holds an active patched layer, open all others.

    The fast path differs from the layers' own code by rounding, and it sets the outputs of padded
    positions to 0; with a patched layer both are gone, as in training.
    """
    for module in model.modules():
        for kind, flag in _FLAGS.items():
            if not isinstance(module, kind):
                continue
            active = any(isinstance(m, Gated) and m._enabled for m in module.modules())
            if active and _BEFORE not in module.__dict__:
                module.__dict__[_BEFORE] = getattr(module, flag)
                setattr(module, flag, False)
            elif not active and _BEFORE in module.__dict__:
                setattr(module, flag, module.__dict__.pop(_BEFORE))
