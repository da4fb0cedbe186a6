"""How far a folded model's output is from what it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.layers.batches import evaluating, part_of, run
from tokengate.layers.folded import unfolded


def output_error(model: nn.Module, batches: Iterable[Any]) -> float:
    """How far the folded model's first output is from the unfolded one's, over all batches."""
    difference = total = 0.0
    with evaluating(model):
        for batch in batches:
            found = _first(run(model, batch))
            with unfolded(model):
                wanted = _first(run(model, batch))
            if bool(wanted.isnan().any()):
                raise TokenGateError(
                    "fold found NaN in the output of the model for a batch, on which every gate is "
                    "open whatever its tau: pass batches without."
                )
            # Infinite ones are those of a mask.
            finite = wanted.isfinite()
            found, wanted = found.double()[finite], wanted.double()[finite]
            difference += (found - wanted).square().sum().item()
            total += wanted.square().sum().item()
    return (difference / total) ** 0.5 if total else 0.0


def _first(output: Any) -> Tensor:
    """A model's logits, or its first floating-point output."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else output
    for value in (part_of(output, "logits"), *values):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value
    raise TokenGateError(
        f"fold found no floating-point tensor in the model's {type(output).__name__}: give it a "
        "report of tokengate.record instead of batches."
    )
