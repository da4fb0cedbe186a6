"""How much of the loss hangs on each layer's modification: what a run says about the next one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokengate.arguments import function
from tokengate.errors import TokenGateError, brief
from tokengate.layers.batches import apart, check_batches, keeping_state, part_of, run
from tokengate.layers.patched import require_layers
from tokengate.layers.restriction import restrict
from tokengate.reports.selection import Importance

#: The loss of a model on a batch, a tensor of one element with gradients.
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]


def fisher_scores(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> dict[str, float]:
    """The sum over positions of (a_i mu_i)^2 in every patched layer, on average over `batches`:

        scores = tokengate.fisher_scores(model, batches)  # after a short run, gated or not
        targets = tokengate.select(scores, 0.4, by="fisher")

    mu_i = <dL/dh_i, m_i> (eq. 10) is, to first order, what the loss would lose if M(x_i) were left
    away; its expected square is what `gate="fisher"` asks of a position, and the sum of it what the
    layer holds. A position that its gate closes (a_i = 0) holds nothing. Of every method, with
    factors or without. One backward pass for each batch, in evaluation mode; no gradient and
    nothing else is left behind.

    Args:
        model: a patched model that was trained for some steps: untrained, M(x) is 0 everywhere, and
            so are these (`suggest` takes a step by itself).
        batches: what the model is called with, labels among it; or what `loss` wants.
        loss: of a model and a batch; by default what the model returns as `loss`.

    Returns:
        By the layers' names, in the loss's unit squared. A mean over twice as many positions makes
        all of them smaller alike.

    Raises:
        TokenGateError: no layer is patched; there are no batches; there is no loss, or it is no
            finite number, hangs on no layer or comes through reentrant checkpointing.
    """
    return scores_of("fisher_scores", model, batches, checked(loss))


def scores_of(asked: str, model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, float]:
    """`fisher_scores`, of a loss that was checked, for the function that was called."""
    sums = dict.fromkeys(require_layers(model, asked), 0.0)
    if torch.is_inference_mode_enabled():
        raise TokenGateError(
            f"{asked} was called under torch.inference_mode, where nothing has gradients: call it "
            "outside of it."
        )
    count, hangs = 0, False
    with apart(model), keeping_state(model):
        for batch in check_batches(asked, batches):
            count += 1
            for name, calls in _gradients(asked, model, batch, loss).items():
                hangs |= bool(calls)
                sums[name] += sum(float(g.double().square().sum()) for g in calls)
    if not hangs:
        raise TokenGateError(
            f"{asked} found a loss that hangs on no patched layer: compute it, with gradients, of "
            "what the model returns."
        )
    return Importance((name, total / count) for name, total in sums.items())


def checked(loss: Loss | None) -> Loss:
    """`loss`, or what the model returns as its own; what it is given, and returns, is looked at.

    Raises:
        TokenGateError: it is no function of a model and a batch, or, in a call, returns something
            else than a tensor of one element.
    """
    if loss is None:
        return loss_of
    example = "e.g. loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
    if any(str(getattr(x, "__module__", "")).startswith("torch.nn.") for x in (loss, type(loss))):
        raise TokenGateError(
            f"loss={getattr(loss, '__name__', brief(loss))} was given, which takes outputs and "
            f"targets: pass a function of the model and a batch, {example}."
        )
    function("loss", loss, "a model", "a batch", example=example.removeprefix("e.g. loss="))

    def of_one_element(model: nn.Module, batch: Any) -> Tensor:
        found = loss(model, batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise TokenGateError(
                f"loss= returned a {type(found).__name__}{shape}, which is no tensor of one "
                f"element: pass a function that returns one, with its gradients, {example}."
            )
        return found

    return of_one_element


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """What the model returns as its loss.

    Raises:
        TokenGateError: it returns none.
    """
    output = run(model, batch)
    found = part_of(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise TokenGateError(
            f"{type(model).__name__} returned no loss, but {brief(output)}: pass batches with "
            "labels, or loss=lambda model, batch: ..."
        )
    return found


def check_finite(asked: str, loss: float) -> None:
    """An error if a loss is no finite number, for the function that was called."""
    if not math.isfinite(loss):
        raise TokenGateError(
            f"{asked} found a loss of {loss:g}: look at the inputs, and at the labels, "
            "which may all be -100 in a batch."
        )


def gradients_of(asked: str, loss: Tensor, of: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Those of `of` alone: what parameters have as .grad stays theirs."""
    # Nothing inside of it has a part in the graph, and so no gradient, or torch raises an error.
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in _graph(loss)):
        raise TokenGateError(
            f"{asked} found reentrant activation checkpointing, through which torch gives no "
            "gradients of single tensors: pass it use_reentrant=False, or switch it off meanwhile."
        )
    return torch.autograd.grad(loss, of, torch.ones_like(loss), allow_unused=True)


def _graph(loss: Tensor) -> set[Any]:
    """All that autograd would go through."""
    found, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(after for after, _ in node.next_functions)
    return found


def _gradients(asked: str, model: nn.Module, batch: Any, loss: Loss) -> dict[str, list[Tensor]]:
    """a_i mu_i at every position of every call, by layer: dL of a weight of 1 at each of them."""
    leaves: dict[str, list[Tensor]] = defaultdict(list)

    def weight(name: str, shape: torch.Size) -> Tensor:
        leaves[name].append(torch.ones(shape, requires_grad=True))
        return leaves[name][-1]

    with torch.enable_grad(), restrict(model, weight):
        model.eval()
        total = loss(model, batch)
        check_finite(asked, float(total.detach()))
        flat = [leaf for calls in leaves.values() for leaf in calls]
        if not (flat and total.requires_grad):
            return {}
        found = iter(gradients_of(asked, total, flat))
    return {
        name: [g for g in (next(found) for _ in calls) if g is not None]
        for name, calls in leaves.items()
    }
