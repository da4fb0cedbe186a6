"""A patched model beside its base on one batch: what was modified, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.arguments import in_our_words
from tokengate.errors import TokenGateError, brief
from tokengate.layers.batches import evaluating, named, run
from tokengate.layers.patched import require_layers
from tokengate.names import inside
from tokengate.patching.disabled import disabled
from tokengate.reports.effects.effect import Effect, effect_of, logits_of
from tokengate.reports.page.sample_views import TokenView
from tokengate.reports.recording import Recorder, record
from tokengate.reports.report import SparsityReport
from tokengate.reports.samples import Samples


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found, on the CPU."""

    ids: Tensor
    """The tokens, `(B, T)`."""
    real: Tensor
    """Which of them are no padding, `(B, T)`."""
    effect: Effect
    """The change of their log-probabilities and their KL, `(B, T)` each, in nats."""
    recorded: Recorder
    """Of the adapted model's forward, with positions and ratios."""

    @property
    def report(self) -> SparsityReport:
        """Sparsity (eq. 23) on this batch."""
        return self.recorded.report()

    def views(self, tokenizer: Any, titles: Sequence[str] = ()) -> list[TokenView]:
        """The samples for `SparsityReport.to_html`, with their effects:

            found = tokengate.compare(model, batch)
            found.report.to_html("report.html", texts=found.views(tokenizer))

        Args:
            tokenizer: one of transformers, or a function that makes a list of strings of a list
                of ids.
            titles: of the first samples, or of all.

        Raises:
            TokenGateError: no patched layer saw these tokens, as where a vision tower alone is
                patched; `tokenizer` is something else; there are more titles than samples.
        """
        read = getattr(tokenizer, "convert_ids_to_tokens", tokenizer)
        if not isinstance(read, Callable):  # type: ignore[arg-type]
            raise TokenGateError(
                f"views was given {brief(tokenizer)} as a tokenizer: pass one that has "
                "convert_ids_to_tokens, or a function from ids to strings."
            )
        samples = self._samples()
        if len(titles) > len(samples):
            raise TokenGateError(
                f"views was given {len(titles)} titles for {len(samples)} samples: pass at most "
                "one for each."
            )
        return [
            TokenView(
                read(self.ids[i].clamp(min=0).tolist()),  # a label of -100 has no word
                sample.is_open,
                self.real[i],
                titles[i] if i < len(titles) else "",
                ratios=sample.ratios,
                log_prob=self.effect.log_prob[i],
                kl=self.effect.kl[i],
            )
            for i, sample in enumerate(samples)
        ]

    def _samples(self) -> Samples:
        """In those modules that saw each text as one sample."""
        for samples in self.recorded.alike:
            if len(samples) == len(self.ids) and len(samples[0].real) == self.ids.shape[1]:
                return samples
        raise TokenGateError(
            f"no patched layer saw these {len(self.ids)} texts of {self.ids.shape[1]} tokens as "
            "such: patch layers of the language model."
        )


@in_our_words(otherwise={"base": "leave it out, as the base is in the model"})
def compare(
    model: nn.Module, batch: Any, *, ids: Tensor | None = None, shift: bool | None = None
) -> Comparison:
    """Run a patched language model and its base on a batch, and say how far apart they are:

        found = tokengate.compare(model, tokenizer(texts, padding=True, return_tensors="pt"))
        found.effect.log_prob[0]    # (T,): of each token, in nats

    Two forwards in evaluation mode, without gradients: the base is `disabled`. Both logits are in
    memory meanwhile, `(B, T, V)` each; what is kept is of size `(B, T)`. Nothing of the model
    changes.

    Args:
        model: a patched model whose output has `logits`, `(B, T, V)`.
        batch: what it is called with: a dict by keyword, a tuple by position.
        ids: the tokens, `(B, T)`; None for the batch's `input_ids`, of an encoder-decoder (which
            transformers' configurations tell) for its `labels`.
        shift: whether logits predict the next token; None for yes, but of an encoder-decoder, and
            of a masked language model, which is told by its class.

    Raises:
        TokenGateError: no layer is patched; there are no tokens, or no logits for each of them.
    """
    require_layers(model, "compare")
    given = named(model, batch)
    core = inside(model)
    # Whose decoder reads its labels one place later, and whose input_ids are of other positions.
    decodes = bool(getattr(getattr(core, "config", None), "is_encoder_decoder", False))
    said, masked_by = ("labels", "decoder_") if decodes else ("input_ids", "")
    tokens = given.get(said) if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        texts = "texts, text_target=answers" if decodes else "texts"
        raise TokenGateError(
            f"compare found no tokens (B, T) in {brief(batch if tokens is None else tokens)}: pass "
            f"one batch with {said}, as tokenizer({texts}, return_tensors='pt') gives it, or the "
            "tokens that the logits predict as ids=."
        )
    if shift is None:
        shift = not decodes and "MaskedLM" not in type(core).__name__
    with evaluating(model):
        with disabled(model):
            base_logits = logits_of(run(model, batch), "compare")
        with record(model, positions=True, ratios=True) as recorded:
            logits = logits_of(run(model, batch), "compare")
    mask = given.get(f"{masked_by}attention_mask", tokens >= 0 if decodes else None)
    masked = isinstance(mask, Tensor) and mask.shape == tokens.shape
    real = mask.bool() if masked else torch.ones_like(tokens, dtype=torch.bool)
    tokens = tokens.to(logits.device)
    effect = effect_of(base_logits, logits, tokens, real, shift=shift)
    return Comparison(tokens.cpu(), real.cpu(), effect, recorded)
