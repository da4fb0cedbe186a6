"""Which layers are worth a modification, in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.layers.batches import check_batches, keeping_modes
from tokengate.layers.patched import all_layers
from tokengate.patching.patch import patch, unpatch
from tokengate.reports.measures.fisher_scores import Loss, fisher_scores, loss_of
from tokengate.reports.selection import select

# How far the probe's one step goes: small enough that M(x) grows in proportion to it.
_STEP = 1e-4
_RANK = 8


def suggest(
    model: nn.Module,
    batches: Iterable[Any],
    fraction: float = 0.4,
    *,
    targets: Any = "all-linear",
    loss: Loss | None = None,
) -> list[str]:
    """The layers that matter most to the loss, for the next `patch(targets=)`:

        names = tokengate.suggest(model, batches, fraction=0.4)
        tokengate.patch(fresh_model, names, method="lora", gate=False)

    Of a model that was trained for some steps, gated or not, those with the highest
    `fisher_scores`. Of one that is untrained, or not patched at all (then it has LoRA of rank 8,
    ungated, for as long as this takes), M(x) is 0, and closing it would change nothing: so all that
    modifications train takes one step first, in the direction of Adam's first step, against the
    gradient over `batches`, and is put back afterwards. That is what the loss wants of each layer
    at the start; a short run, which is more work, tells more. Two backward passes for each batch,
    or one where the model was trained; nothing is left behind, no gradient and no random number.

    Args:
        model: patched or not.
        batches: a few, of what the model is called with, labels among it; or of what `loss` wants.
        fraction: the share of layers to name, in (0, 1]; see `select`.
        targets: of a model that is not patched, the layers to choose from, as `patch` takes them.
        loss: of a model and a batch; by default what the model returns as `loss`.

    Returns:
        Full names in the model's order.

    Raises:
        TokenGateError: what `fisher_scores`, `select` and `patch` refuse; the loss does not depend
            on any of the layers.
    """
    check_batches("suggest", batches)
    batches = list(batches)
    if all_layers(model):
        scores = fisher_scores(model, batches, loss)
        if not any(scores.values()):
            with _one_step(model, batches, loss or loss_of):
                scores = fisher_scores(model, batches, loss)
    else:
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            patch(model, targets, "lora", rank=_RANK, gate=False)
        try:
            with _one_step(model, batches, loss or loss_of):
                scores = fisher_scores(model, batches, loss)
        finally:
            unpatch(model)
    return select(scores, fraction, by="fisher")


@contextlib.contextmanager
def _one_step(model: nn.Module, batches: list[Any], loss: Loss) -> Iterator[None]:
    """Within this context, what the modifications train is one step of Adam away."""
    trained = [
        parameter
        for layer in all_layers(model).values()
        for parameter in layer.modification.parameters()
        if parameter.requires_grad
    ]
    sums = [torch.zeros_like(parameter) for parameter in trained]
    with keeping_modes(model), torch.enable_grad():
        model.eval()
        for batch in batches:
            total = loss(model, batch)
            if not (trained and total.requires_grad):
                raise TokenGateError(
                    "suggest found a loss that hangs on no layer that could be modified: pass "
                    "other targets, or a loss with gradients."
                )
            for found, gradient in zip(
                sums, torch.autograd.grad(total.sum(), trained, allow_unused=True), strict=True
            ):
                found.add_(0 if gradient is None else gradient)
    kept: list[Tensor] = [parameter.detach().clone() for parameter in trained]
    try:
        with torch.no_grad():
            for parameter, gradient in zip(trained, sums, strict=True):
                parameter.sub_(_STEP * gradient.sign())
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
