"""Which layers are worth a modification, in one call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokengate.arguments import count, positive, unused
from tokengate.errors import TokenGateError, brief
from tokengate.layers.batches import apart, check_batches, keeping_state
from tokengate.layers.patched import all_layers
from tokengate.patching.patch import patch, unpatch
from tokengate.reports.measures.fisher_scores import (
    Loss,
    check_finite,
    checked,
    gradients_of,
    scores_of,
)
from tokengate.reports.selection import check_fraction, select
from tokengate.training.wrapped_optimizers import Follower

_RANK, _STEPS = 8, 32
# The first learning rate of the short run where none is asked for, and shares of it to try besides.
_LR, _CALMER = 1e-2, (1.0, 0.25, 0.0625)

# Of each parameter a copy, and the gradient that it had.
_Values: TypeAlias = list[tuple[Tensor, Tensor | None]]


def suggest(
    model: nn.Module,
    batches: Iterable[Any],
    fraction: float = 0.4,
    *,
    targets: Any = None,
    train: Any = (),
    loss: Loss | None = None,
    steps: int | None = None,
    lr: float | None = None,
) -> list[str]:
    """The layers that matter most to the loss, for the next `patch(targets=)`:

        names = tokengate.suggest(model, batches, fraction=0.4)
        tokengate.patch(fresh_model, names, method="lora", gate=False)

    Of a model that was trained for some steps, gated or not, those with the highest
    `fisher_scores`: one backward pass for each batch. Of one that is untrained, or not patched at
    all (then it has LoRA of rank 8, ungated, for as long as this takes), M(x) is 0, and closing it
    would change nothing: so what is to be trained is, for some steps of Adam, one batch after the
    other, and is put back afterwards. That run has to be, at a rate that learns, and to see enough:
    where few batches come again and again, a new head learns them by heart, and what is named is
    hardly better than chance (docs/which_layers.md). Nothing is left behind, no gradient and no
    random number, also none that `loss` draws.

    Args:
        model: patched or not.
        batches: of what the model is called with, labels among it, or of what `loss` wants; of an
            untrained model best about a quarter of a training's.
        fraction: the share of layers to name, in (0, 1]; see `select`.
        targets: of a model that is not patched, the layers to choose from, as `patch` takes them;
            None for "all-linear".
        train: likewise, what else is to be trained, as a new head.
        loss: of a model and a batch; by default what the model returns as `loss`.
        steps: of an untrained model's run; by default one for each batch, and 32 at least.
        lr: of Adam in it, as the training's; a quarter of it, and a sixteenth, are tried where the
            loss does not fall. By default it is run at each of 1e-2, 2.5e-3 and 6.25e-4, and the
            scores are those of the lowest loss.

    Returns:
        Full names in the model's order.

    Raises:
        TokenGateError: what `fisher_scores`, `select` and `patch` refuse; `targets` or `train` of a
            patched model, `steps` or `lr` of one that is trained; the loss does not depend on any
            of the layers, or does not fall.
    """
    check_fraction(fraction)
    if steps is not None:
        count("steps", steps)
    if lr is not None:
        positive("lr", lr)
    is_patched = bool(all_layers(model))
    if is_patched and (targets is not None or train):
        name, value = ("train", train) if targets is None else ("targets", targets)
        raise TokenGateError(
            f"suggest was given {name}={brief(value)} of a model that is patched, whose layers it "
            "chooses from as they are: leave it out, or call tokengate.unpatch(model) first."
        )
    batches, loss = list(check_batches("suggest", batches)), checked(loss)
    with apart(model):
        if is_patched:
            scores = scores_of("suggest", model, batches, loss)
            if any(scores.values()):
                unused("suggest", "on a model that is trained", steps=steps, lr=lr)
                return select(scores, fraction, by="fisher")
        else:
            chosen = "all-linear" if targets is None else targets
            with torch.random.fork_rng(range(torch.cuda.device_count())):  # which it seeds all
                torch.manual_seed(0)
                patch(model, chosen, "lora", rank=_RANK, gate=False, train=train)
        try:
            run = steps or max(_STEPS, len(batches))
            with _trained_a_little(model, batches, loss, run, lr):
                scores = scores_of("suggest", model, batches, loss)
        finally:
            if not is_patched:
                unpatch(model)
    return select(scores, fraction, by="fisher")


@contextlib.contextmanager
def _trained_a_little(
    model: nn.Module, batches: list[Any], loss: Loss, steps: int, lr: float | None
) -> Iterator[None]:
    """Within this context, all that is trained but gates is some steps away, and the loss lower."""
    rates = [share * (lr or _LR) for share in _CALMER]
    gates = [layer.gate for layer in all_layers(model).values() if layer.gate is not None]
    of_gates = {id(p) for gate in gates for p in gate.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in of_gates]
    if not trained:
        raise TokenGateError(
            f"suggest found nothing to train in this patched {type(model).__name__}, whose "
            "modifications are 0: set requires_grad_(True) on their parameters, or pass the model "
            "that was trained."
        )
    kept, learned = _values(trained), None
    try:
        with keeping_state(model):
            model.eval()
            check_finite("suggest", before := _mean(model, batches, loss))
            lowest = before
            for rate in rates:
                again = itertools.islice(itertools.cycle(batches), steps)
                _train(model, trained, again, loss, rate)
                after = _mean(model, batches, loss)
                if after < lowest:
                    lowest, learned = after, _values(trained)
                _put_back(trained, kept)
                if learned and lr is not None:
                    break
            if learned is None:
                found = f"went from {before:.4g} to {after:.4g}: pass a smaller lr"
                if after == before:
                    found = (
                        f"stayed at {before:.4g}, as where gates close all positions or nothing is "
                        "left to be learned: patch with tau=0, pass a larger lr"
                    )
                raise TokenGateError(
                    f"suggest trained for {steps} steps at lr={rates[0]:g} and less, and the loss "
                    f"{found}, or train the model some steps by yourself before."
                )
        _put_back(trained, learned)
        yield
    finally:
        _put_back(trained, kept)


def _train(
    model: nn.Module, trained: list[nn.Parameter], batches: Iterable[Any], loss: Loss, lr: float
) -> None:
    # A trial, of which nobody is to be told.
    optimizer = Follower(trained, lr)
    for batch in batches:
        with torch.enable_grad():
            total = loss(model, batch)
        if not total.requires_grad:
            raise TokenGateError(
                "suggest found a loss that hangs on no layer that could be modified: pass other "
                "targets, or a loss with gradients."
            )
        gradients = gradients_of("suggest", total, trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def _values(trained: list[nn.Parameter]) -> _Values:
    return [(p.detach().clone(), p.grad) for p in trained]


@torch.no_grad()
def _put_back(trained: list[nn.Parameter], kept: _Values) -> None:
    for parameter, (value, gradient) in zip(trained, kept, strict=True):
        parameter.copy_(value)
        parameter.grad = gradient


@torch.no_grad()
def _mean(model: nn.Module, batches: list[Any], loss: Loss) -> float:
    return sum(float(loss(model, batch).sum()) for batch in batches) / len(batches)
