"""How far an adapted model is from its base, on any data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokengate.arguments import choice, function, in_our_words, share
from tokengate.errors import TokenGateError, brief
from tokengate.kernels.precision import finest_dtype
from tokengate.layers.batches import apart, check_batches, evaluating, named, part_of, run
from tokengate.layers.patched import require_layers
from tokengate.layers.restriction import restrict
from tokengate.names import inside
from tokengate.patching.disabled import disabled

# Positions at a time: each has a hundred thousand numbers in a large language model.
_ROWS = 1024
# Problems of transformers' classifiers whose logits are a number in each column.
_NUMBERS = ("multi_label_classification", "regression")
# Where features stand in outputs, the first that is there; of towers beside each other all of them.
_TOWERS = ("image_embeds", "text_embeds", "audio_embeds", "video_embeds", "speech_embeds")
_FEATURES = (("sentence_embedding",), ("last_hidden_state",), _TOWERS, ("pooler_output",))


@dataclass(frozen=True)
class Drift:
    """How far outputs are from the base's, on average over positions; `float(drift)` is `mean`."""

    mean: float
    measure: str
    """"kl": KL(base || adapted) of the distributions, in nats. "cosine": 1 - cosine of features.
    "difference": |adapted - base|, of models that predict one number."""
    positions: int
    """How many were averaged over: real tokens, or samples where each has one output."""

    def __float__(self) -> float:
        return self.mean

    def __str__(self) -> str:
        unit = " nats" if self.measure == "kl" else ""
        return f"{self.measure} to the base {self.mean:.4g}{unit} ({self.positions} positions)"


@in_our_words(otherwise={"base": "leave it out, as the base is in the model"})
def drift(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    scale: float = 1.0,
    measure: str = "auto",
    output: Callable[[Any], Tensor] | None = None,
) -> Drift:
    """How far `model` is from its base on `batches`, in evaluation mode, by `disabled`:

        print(tokengate.drift(model, batches))  # kl to the base 0.0312 nats (512 positions)
        print(tokengate.drift(model, batches, scale=0.8))  # with M(x) four fifths as large

    What a gate spares a model of forgetting, a smaller modification does, too: so compare a gated
    model with an ungated one at a `scale` with the same score. A head that was trained along is
    part of both models. Outputs' `logits` are distributions over their last axis, one at each
    position; outputs of one column are numbers, as are logits of several labels or of a regression;
    all others, and plain tensors, are features, unless `measure` says otherwise; of two towers, as
    CLIP's, the embeddings of both. Of positions only real ones count: by `attention_mask` (in
    encoder-decoders the decoder's), or, without one, where labels are not -100.
    What the model draws at random is the same on both sides.

    Args:
        model: a patched model.
        batches: what the model is called with: dicts by keyword, tuples by position.
        scale: M(x) is multiplied by it, in [0, 1]; see `restrict`, which this is.
        measure: "auto", "kl", "cosine" or "difference".
        output: from what the model returns to the tensor to compare, `(B, C)` or `(B, T, C)`;
            logits that it changes, but for their dtype, are features to "auto".

    Raises:
        TokenGateError: no layer is patched; there are no batches, or no position in them is real;
            an output or a mask has another shape; `measure` says nothing of outputs of one number;
            an argument is wrong.
    """
    require_layers(model, "drift")
    batches = check_batches("drift", batches)
    measure = choice("measure", measure, ("auto", *_MEASURES))
    share("scale", scale, whole=True)
    if output is not None:
        function("output", output, "what the model returns", example="lambda output: output.logits")
    total, count, used = 0.0, 0, measure
    with evaluating(model), apart(model):
        for batch in batches:
            with apart(model), disabled(model):
                before = run(model, batch)
            with _scaled(model, scale):  # with the same random numbers
                after = run(model, batch)
            base, adapted = ((output or _found)(each) for each in (before, after))
            if not isinstance(base, Tensor) or base.dim() not in (2, 3):
                found = f"a shape {tuple(base.shape)}" if isinstance(base, Tensor) else brief(base)
                raise TokenGateError(
                    f"drift found an output of {found}: pass output=, which returns a tensor "
                    "(batch, numbers) or (batch, positions, numbers)."
                )
            used = _measure_of(model, before, base) if used == "auto" else used
            if used != "difference" and base.shape[-1] == 1:
                raise TokenGateError(
                    f"measure={used!r} was asked of outputs of one number each, of which it tells "
                    'nothing: pass measure="difference".'
                )
            real = _real(model, batch, base) if base.dim() == 3 else None
            base, adapted = (each if real is None else each[real] for each in (base, adapted))
            dtype = finest_dtype(base.device)
            both = base.flatten(0, -2), adapted.flatten(0, -2)
            for at in range(0, len(both[0]), _ROWS):
                rows = (each[at : at + _ROWS].to(dtype) for each in both)
                total += float(_MEASURES[used](*rows).sum())
            count += base.shape[:-1].numel()
    if not count:
        raise TokenGateError("drift found no real position in the batches: pass some with data.")
    return Drift(total / count, used, count)


def kl(base: Tensor, adapted: Tensor) -> Tensor:
    """KL(base || adapted) of logits, in nats: `(..., C), (..., C) -> (...)`."""
    p, q = F.log_softmax(base, -1), F.log_softmax(adapted, -1)
    # What the base rules out (a logit of -inf) adds nothing; what is not a number is to be seen.
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "cosine": lambda base, adapted: 1 - F.cosine_similarity(base, adapted, dim=-1),
    "difference": lambda base, adapted: (adapted - base).abs().mean(-1),
}


def _scaled(model: nn.Module, scale: float) -> contextlib.AbstractContextManager[Any]:
    if scale == 1.0:
        return contextlib.nullcontext()
    return restrict(model, lambda name, shape: torch.full(shape, scale))


def _measure_of(model: nn.Module, output: Any, compared: Tensor) -> str:
    """What can be said of this output: distributions, numbers or features."""
    if compared.shape[-1] == 1:
        return "difference"
    logits = _part(output, "logits")
    if logits is None or not _some_of(logits, compared):
        return "cosine"
    problem = _configured(model, "problem_type")
    return "difference" if problem in _NUMBERS else "kl"


def _some_of(logits: Tensor, compared: Tensor) -> bool:
    """Whether they are these logits, in any dtype, or a view of some positions of them."""
    same = logits.untyped_storage().data_ptr() == compared.untyped_storage().data_ptr()
    if same or logits.shape != compared.shape:
        return same and logits.shape[-1] == compared.shape[-1]
    return torch.equal(logits.to(compared), compared)


def _configured(model: nn.Module, name: str) -> Any:
    return getattr(getattr(inside(model), "config", None), name, None)


def _part(output: Any, name: str) -> Tensor | None:
    found = part_of(output, name)
    return found if isinstance(found, Tensor) else None


def _found(output: Any) -> Tensor:
    """The tensor to compare."""
    if isinstance(output, Tensor):
        return output
    for names in (("logits",), *_FEATURES):
        parts = [part for name in names if (part := _part(output, name)) is not None]
        if len(parts) == 1:
            return parts[0]
        if parts and len({part.shape[-1] for part in parts}) == 1:
            return torch.cat([part.flatten(0, -2) for part in parts])
    raise TokenGateError(
        f"drift found no logits and no features in {brief(output)}: pass output=, a function from "
        "what the model returns to a tensor."
    )


def _real(model: nn.Module, batch: Any, base: Tensor) -> Tensor | None:
    """Which positions of an output `(B, T, C)` are real, `(B, T)`; None where all are."""
    given, decodes = named(model, batch), _configured(model, "is_encoder_decoder")
    mask, labels = given.get("decoder_attention_mask" if decodes else "attention_mask"), None
    if mask is None:
        labels = given.get("labels")
        mask = labels
    if not isinstance(mask, Tensor) or (labels is not None and mask.shape != base.shape[:2]):
        return None
    if mask.shape != base.shape[:2]:
        raise TokenGateError(
            f"drift was given an attention_mask of shape {tuple(mask.shape)} for outputs of shape "
            f"{tuple(base.shape)}: pass output=, which returns what the mask is of."
        )
    return (mask != 0 if labels is None else mask != -100).to(base.device)
