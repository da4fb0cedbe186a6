"""The norms of M(x_i) and of W0 x_i at every position, while a model runs over a user's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.gates.deciding import Observer
from tokengate.gates.tally import by_sample, weights_of
from tokengate.kernels.norms import Norms, reshaped
from tokengate.layers.batches import check_batches, evaluating, run
from tokengate.layers.calls import RECORD, in_context
from tokengate.layers.gated_linear import Gated
from tokengate.layers.patched import observers
from tokengate.layers.several import refuse_several

# What is told of one call of a layer: the norms of m and of w, what each position weighs, and its
# score for the gate if that is wanted, all of them (B, T). The real positions of a sample weigh 1
# together, as in eq. 23, padding nothing.
Listener: TypeAlias = Callable[..., None]


def measure(
    asked: str,
    model: nn.Module,
    patched: Mapping[str, Gated],
    listeners: Mapping[str, Listener],
    batches: Iterable[Any],
    scores: bool = False,
) -> None:
    """Run `model` once over `batches`, in evaluation mode, and tell what its layers do.

    Args:
        asked: the function that was called, for the errors.
        model: a patched model.
        patched: the layers to look at, by name.
        listeners: who is told of each of them, or by their own names of each of its experts.
        batches: what the model is called with.
        scores: whether the listeners are told the gates' scores.

    Raises:
        TokenGateError: these are no batches; `use` was given rows; a layer saw no position, or
            numbers that are not finite at a real one.
    """
    batches = check_batches(asked, batches)
    refuse_several(asked, patched)
    watchers, unseen = watching(asked, patched, listeners, scores)
    with evaluating(model), in_context(RECORD, watchers):
        for batch in batches:
            run(model, batch)
    if unseen:
        raise TokenGateError(
            f"{asked} saw no position of {next(iter(unseen))!r} in the batches: pass some with "
            "which the model calls all its layers."
        )


def watching(
    asked: str, patched: Mapping[str, Gated], listeners: Mapping[str, Listener], scores: bool
) -> tuple[dict[nn.Module, Observer], dict[str, Gated]]:
    """For `in_context(RECORD, ...)`; and those of `patched` that have seen no position so far."""
    # Of a layer's experts some may be given no position.
    unseen = {name: layer for name, layer in patched.items() if name in listeners}

    def observer(name: str) -> Observer:
        told = partial(_observe, asked, name, listeners[name], unseen)
        return Observer(told, norms=True, scores=scores)

    return observers(patched, observer), unseen


def _observe(
    asked: str,
    name: str,
    listen: Listener,
    unseen: dict[str, Gated],
    is_open: Tensor | None,
    h: Tensor,
    mask: Tensor | None,
    norms: tuple[Norms, Norms] | None,
    scores: Tensor | None = None,
) -> None:
    if norms is None or not h.numel():
        return
    at = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
    _, real = by_sample(at, mask)
    if not real.any():
        return
    unseen.pop(name, None)
    of_m, of_w = (reshaped(each, lambda of: of.reshape(real.shape)) for each in norms)
    for what, (norm, _) in (("W0 x", of_w), ("M(x)", of_m)):
        broken = real & ~norm.isfinite()
        if broken.any():
            raise TokenGateError(
                f"{asked} found {what} of {name!r} not finite at {int(broken.sum())} of "
                f"{int(real.sum())} positions of a batch: look at the inputs and at the weights."
            )
    listen(of_m, of_w, weights_of(real), *([] if scores is None else [scores.reshape(real.shape)]))
