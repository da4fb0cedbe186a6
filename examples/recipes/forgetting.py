"""How far a trained model is from its base, and replay of the base's texts, which keeps it near.

Every recipe reports both beside its scores: the drift, and that with M(x) x 0.8 at test, for a gate
spares a model no more of it than a smaller modification does unless it is below that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokengate
from tokengate.integrations.trainer import TokenGateTrainer

SCALES = {"drift": 1.0, "drift of 0.8 M(x)": 0.8}
TEXTS = 3  # of replay, in each forward


def drifts(name: str, model: nn.Module, batches: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Both, as results have them, by the test `name`; batches are dicts, on any device."""
    device = next(model.parameters()).device
    there = [
        {key: each.to(device) if isinstance(each, Tensor) else each for key, each in batch.items()}
        for batch in batches
    ]
    return {
        what: {name: float(tokengate.drift(model, there, scale=scale))}
        for what, scale in SCALES.items()
    }


@torch.no_grad()
def own_texts(model: Any, start: int, count: int, length: int, seed: int) -> Tensor:
    """Texts that a causal language model writes by itself, drawn from what it predicts.

    `(count, length)`, each after the token `start`, which it begins with.
    """
    model.eval()
    first = torch.full((count, 1), start, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts: Tensor = model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, top_p=1.0,
            max_length=length, min_length=length, pad_token_id=start,
        )  # fmt: skip
    return texts


class Replaying(TokenGateTrainer):
    """Adds beta KL(base || model) on three of the base's own texts to the loss of each forward.

    `replayed` gives it these. The KL is a mean over positions, in nats.
    """

    beta = 0.0
    texts: Tensor
    draw: torch.Generator

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, **more)
        if not (self.beta and model.training):
            return found
        loss, *rest = found if return_outputs else (found,)
        share = 1.0
        if self.model_accepts_loss_kwargs and more.get("num_items_in_batch") is not None:
            # Then the Trainer adds up the micro-batches' losses as they are.
            share = 1 / self.args.gradient_accumulation_steps
        loss = loss + share * self.beta * self.forgotten(model)
        return (loss, *rest) if return_outputs else loss

    def forgotten(self, model: nn.Module) -> Tensor:
        """KL(base || model) on some of the texts."""
        drawn = torch.randint(len(self.texts), (TEXTS,), generator=self.draw)
        ids = self.texts[drawn].to(self.args.device)
        with torch.no_grad(), tokengate.disabled(model):
            base = F.log_softmax(logits_of(model, ids), -1)
        now = F.log_softmax(logits_of(model, ids), -1)
        return F.kl_div(now, base, reduction="batchmean", log_target=True)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """`(B, T)` to `(B T, C)`, in float32."""
    output = model(input_ids=ids)
    logits: Tensor = output["logits"] if isinstance(output, Mapping) else output.logits
    return logits.flatten(0, 1).float()


def replayed(beta: float, texts: Tensor, seed: int) -> type[TokenGateTrainer]:
    """A Trainer that replays these texts, `(count, length)`."""
    draw = torch.Generator().manual_seed(seed)
    return type("Replaying", (Replaying,), {"beta": beta, "texts": texts, "draw": draw})
