"""The base model for a while, in a patched one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tokengate.contexts import context
from tokengate.layers.calls import DISABLED, in_context
from tokengate.layers.changing import changing
from tokengate.layers.folded import folded
from tokengate.layers.patched import all_layers, require_layers


@context
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is the base model, exactly. May be nested.

    It belongs to this thread or task: other ones run as they did. But W0 of folded layers is put
    back for all.

    Raises:
        TokenGateError: no layer of the model is patched; it is folded, and another thread uses it.
    """
    merged = [(each, each.merged) for each in folded(model).values()]
    patched = all_layers(model)
    if not (merged or patched):
        require_layers(model, "disabled")
    try:
        if merged:
            with changing(model, "disabled"):
                for each, _ in merged:
                    each.put(merged=False)
        with in_context(DISABLED, dict.fromkeys(patched.values(), True)):
            yield
    finally:
        # What was undone or unpatched meanwhile has W0 for good.
        remaining = {id(each) for each in folded(model).values()}
        for each, was_merged in merged:
            if id(each) in remaining:
                each.put(was_merged)
