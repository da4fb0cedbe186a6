"""How far an adapted model's distributions are from those of its base, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokengate.errors import TokenGateError, brief
from tokengate.layers.batches import part_of

# Positions whose distributions are in float32 at once.
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Effect:
    """Two numbers in nats for each token; NaN where nothing predicts it, and at padding."""

    log_prob: Tensor
    """log p(token) of the adapted model less that of the base, `(..., T)`."""
    kl: Tensor
    """KL(p || p_base) of the distributions that predict the token, `(..., T)`."""


def effect_of(
    base_logits: Tensor,
    logits: Tensor,
    ids: Tensor,
    real: Tensor | None = None,
    *,
    shift: bool = True,
) -> Effect:
    """The change of each token's log-probability, and the KL of its distribution.

        log p(x_i) - log p_base(x_i),    sum_v p(v) (log p(v) - log p_base(v))

    Args:
        base_logits, logits: `(..., T, V)`, of the base and of the adapted model.
        ids: the tokens, `(..., T)`. One outside the vocabulary, as -100, has no effect.
        real: which of them are no padding, `(..., T)`; None for all.
        shift: whether the logits at one position predict the token at the next, as in a language
            model that reads from left to right: the first real token then has no effect. False
            where they predict the token at their own position, as in a masked language model.

    Raises:
        TokenGateError: shapes do not fit.
    """
    for name, given in (("base_logits", base_logits), ("logits", logits)):
        fits = isinstance(given, Tensor) and given.dim() > 1 and given.is_floating_point()
        if not fits or given.shape[:-1] != ids.shape or given.shape != logits.shape:
            shape = tuple(given.shape) if isinstance(given, Tensor) else brief(given)
            raise TokenGateError(
                f"{name} are {shape} for tokens of shape {tuple(ids.shape)}: pass logits of shape "
                "(..., T, V), of both models as many, and the T tokens that they predict."
            )
    known = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(ids.device).bool()
    wanted = known & (ids >= 0) & (ids < logits.shape[-1])
    if shift:
        wanted[..., 1:] &= known[..., :-1]
        wanted[..., 0] = False
    at = wanted.nonzero()
    # Of each token the place whose logits predict it.
    by = at - torch.tensor([0] * (ids.dim() - 1) + [int(shift)], device=at.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = torch.full((2, *ids.shape), torch.nan, dtype=dtype, device=ids.device)
    for start in range(0, len(at), _CHUNK):
        place: Any = at[start : start + _CHUNK].unbind(1)
        source: Any = by[start : start + _CHUNK].unbind(1)
        new = logits[source].to(dtype).log_softmax(-1)
        old = base_logits[source].to(dtype).log_softmax(-1)
        # What cannot be drawn adds nothing, though its logarithms are infinite.
        terms = torch.where(new == -torch.inf, 0.0, new.exp() * (new - old))
        token = ids[place].unsqueeze(-1)
        found[(0, *place)] = (new.gather(-1, token) - old.gather(-1, token)).squeeze(-1)
        found[(1, *place)] = terms.sum(-1).clamp(min=0)  # rounding apart it is never below
    return Effect(*found.cpu())


def logits_of(output: Any, asked: str) -> Tensor:
    """Of what a model returned: its `logits`, or itself."""
    found = part_of(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() < 3:
        shape = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else brief(found)
        raise TokenGateError(
            f"{asked} was given a model whose output has logits {shape}, where one distribution "
            "for each token is wanted, (B, T, V): pass a language model."
        )
    return found
