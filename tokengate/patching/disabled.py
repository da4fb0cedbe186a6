"""The base model for a while, in a patched one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from tokengate.layers.fast_path import settle_fast_paths
from tokengate.layers.folded import folded
from tokengate.layers.patched import all_layers, require_layers


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is the base model, exactly. May be nested.

    Raises:
        TokenGateError: no layer of the model is patched.
    """
    merged = [(each, each.merged) for each in folded(model).values()]
    patched = all_layers(model).values()
    if not (merged or patched):
        require_layers(model, "disabled")
    before = {layer: layer.__dict__.get("_enabled") for layer in patched}
    try:
        for each, _ in merged:
            each.put(merged=False)
        for layer in before:
            layer._enabled = False
        settle_fast_paths(model)
        yield
    finally:
        for layer, enabled in before.items():
            if enabled is not None:
                layer._enabled = enabled
            else:
                layer.__dict__.pop("_enabled", None)
        # What was undone or unpatched meanwhile has W0 for good.
        remaining = {id(each) for each in folded(model).values()}
        for each, was_merged in merged:
            if id(each) in remaining:
                each.put(was_merged)
        settle_fast_paths(model)
