"""The norms of M(x_i) and of W0 x_i at every position, while a model runs over a user's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.gates.tally import by_sample
from tokengate.gates.threshold import TokenGate, measuring
from tokengate.kernels.norms import Norms, reshaped
from tokengate.kernels.precision import trainable_dtype
from tokengate.layers.batches import check_batches, evaluating, run
from tokengate.layers.gated_linear import Gated, last_norms, observing

# What is told of one call of a layer: the norms of m and of w, and what each position weighs, all
# of them (B, T). The real positions of a sample weigh 1 together, as in eq. 23, padding nothing.
Listener: TypeAlias = Callable[[Norms, Norms, Tensor], None]


def measure(
    asked: str,
    model: nn.Module,
    patched: Mapping[str, Gated],
    listeners: Mapping[str, Listener],
    batches: Iterable[Any],
) -> None:
    """Run `model` once over `batches`, in evaluation mode, and tell what its layers do.

    Args:
        asked: the function that was called, for the errors.
        model: a patched model.
        patched: the layers to look at, by name.
        listeners: who is told of each of them.
        batches: what the model is called with.

    Raises:
        TokenGateError: these are no batches; `use` was given rows; a layer saw no position.
    """
    check_batches(asked, batches)
    if any(layer._rows is not None for layer in patched.values()):
        raise TokenGateError(
            f"{asked} was asked of a model whose rows have their own adapters: call "
            "tokengate.use(model, name) first, with the one that is meant."
        )
    unseen = dict(patched)
    ungated = [layer for layer in patched.values() if layer.gate is None]
    try:
        for layer in ungated:
            # One that is always open, and measures.
            own: Any = next(layer.modification.parameters(), layer.weight)
            layer.gate = TokenGate(dtype=trainable_dtype(own), device=own.device)
        gates = [layer.gate for layer in patched.values() if layer.gate is not None]
        observers = {
            layer: partial(_observe, name, layer, listeners[name], unseen)
            for name, layer in patched.items()
        }
        with evaluating(model), measuring(gates), observing(observers):
            for batch in batches:
                run(model, batch)
    finally:
        for layer in ungated:
            layer.gate = None
    if unseen:
        raise TokenGateError(
            f"{asked} saw no position of {next(iter(unseen))!r} in the batches: pass some with "
            "which the model calls all its layers."
        )


def _observe(
    name: str,
    layer: Gated,
    listen: Listener,
    unseen: dict[str, Gated],
    is_open: Tensor | None,
    h: Tensor,
    mask: Tensor | None,
) -> None:
    measured = None if is_open is None else last_norms(layer, is_open)
    if is_open is None or measured is None or not is_open.numel():
        return
    _, real = by_sample(is_open, mask)
    if not real.any():
        return
    unseen.pop(name, None)
    of_m, of_w = (reshaped(norms, lambda of: of.reshape(real.shape)) for norms in measured)
    listen(of_m, of_w, real.double() / real.sum(1, keepdim=True).clamp(min=1))
