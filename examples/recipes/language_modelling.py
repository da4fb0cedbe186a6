"""A small pretrained causal LM adapted to a text, with every method, gated or not.

By default stories260K of llama2.c (260,032 parameters, trained on stories for children):

    python examples/convert_llama2c.py stories260K.bin tok512.bin outputs/stories260K
    python examples/recipes/language_modelling.py --data tinyshakespeare.txt.xz --gate off 0.6

The first 80 % of the text are trained on, the last 10 % are the test, and those between are the
validation part, on which `--validation` measures instead. What is measured is bits per byte of the
text, so that it does not depend on the tokenizer: less is better. The drift is KL(base || adapted)
on texts that the base writes; `--replay BETA` adds beta times that, on others of its texts, to the
loss. What `recipe.py` says of recipes holds here; in results.json are also the perplexity of a
token, both before the training (`before`, `after`), and the sparsity of every module.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import recipe
import torch
from forgetting import drifts, own_texts, replayed
from made_up import WORDS
from packed import read_bytes
from tokenizers.implementations import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import tokengate
from tokengate import TokenGateError
from tokengate.integrations.language import PAPER_TARGETS, roles
from tokengate.integrations.trainer import TokenGateTrainer

MODEL = "outputs/stories260K"
LENGTH = 256
NAME = "bits per byte (less is better)"
WRITTEN, REPLAYED = 16, 48  # texts of the base's own: for the drift, and to be replayed


def read(path: Path) -> str:
    """A text in UTF-8, also compressed with xz."""
    return read_bytes(path).decode()


def made_up() -> str:
    """Sentences of no meaning, with which the script can be tried."""
    draw = random.Random(0)
    return "".join(" ".join(draw.choices(WORDS, k=8)).capitalize() + ".\n" for _ in range(1000))


def parts(text: str, validation: bool) -> tuple[str, str]:
    """What is trained on and what is held out: tenths of the text, in its order."""
    first, last = 8 + (not validation), 9 + (not validation)
    at = [len(text) * tenth // 10 for tenth in (8, first, last)]
    return text[: at[0]], text[at[1] : at[2]]


def start_of(tokenizer: Any) -> int:
    """The token that a text begins with."""
    found: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if found is None else found


def blocks(text: str, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """The text in pieces of 256 tokens, the last of what is left: its start, then 255 in a row."""
    start = start_of(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    found = []
    for at in range(0, len(tokens), LENGTH - 1):
        block = torch.tensor([start, *tokens[at : at + LENGTH - 1]])
        found.append({"input_ids": block, "labels": block})
    return found


@torch.no_grad()
def measure(model: torch.nn.Module, held_out: list[Any], text: str, batch: int) -> dict[str, float]:
    """Bits per byte of `text`, every token of which is predicted once, and perplexity per token."""
    model.eval()
    *full, last = [block["input_ids"].to(model.device) for block in held_out]
    batches = [torch.stack(full[at : at + batch]) for at in range(0, len(full), batch)]
    nats, count = 0.0, 0
    for ids in [*batches, last[None]]:
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        nats += cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
        count += len(logits)
    return {
        "bits per byte": nats / math.log(2) / len(text.encode()),
        "perplexity": math.exp(nats / count),
    }


def tiny(text: str) -> tuple[torch.nn.Module, Any]:
    """A model without any knowledge, and a tokenizer that knows the text alone."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator([text], vocab_size=300, special_tokens=["<s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, bos_token="<s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def pretrained(folder: str) -> tuple[torch.nn.Module, Any]:
    """The model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def perform(run: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once."""
    train, held_out = parts(read(run.data) if run.data else made_up(), run.validation)
    if run.smoke:
        train, held_out = train[:10000], held_out[:2000]
    model, tokenizer = tiny(train) if run.smoke else pretrained(run.model)
    test, samples = blocks(held_out, tokenizer), blocks(train, tokenizer)[:-1]
    if not samples:
        raise TokenGateError(f"{run.data} has less than {LENGTH} tokens to train on: pass more.")
    random.Random(0).shuffle(samples)
    before = measure(model, test, held_out, run.batch_size)
    # Written before it is patched; the same for all runs.
    count, length = WRITTEN + (REPLAYED if run.replay else 0), 32 if run.smoke else LENGTH
    written, replay = own_texts(model, start_of(tokenizer), count, length, seed=0).split(
        [WRITTEN, count - WRITTEN]
    )
    kind = replayed(run.replay, replay.cpu(), run.seed) if run.replay else TokenGateTrainer
    recipe.patch(model, roles(model, *PAPER_TARGETS["commonsense"]), run)
    trainer = recipe.fit(model, run, samples[: run.rows], None, kind=kind)
    with tokengate.record(model) as rec:
        after = measure(model, test, held_out, run.batch_size)
    report = rec.report()
    return {
        "scores": {NAME: after["bits per byte"]},
        "decimals": 3,
        "sparsity": {NAME: 100 * report.sparsity},
        **drifts(NAME, model, [{"input_ids": ids} for ids in written.split(8)]),
        "before": before,
        "after": after,
        "report": report.to_dict(),
        "log": trainer.state.log_history,
    }


def preset(run: argparse.Namespace) -> dict[str, Any]:
    """What `--smoke` chooses."""
    smoke = {"rows": 16, "epochs": 2, "rank": 2, "batch_size": 4, "lr": 1e-2, "s": 1e-4}
    return smoke if run.smoke else {}


def main() -> None:
    """Every method on one text."""
    options = recipe.options(__doc__)
    add = options.add_argument
    add("--data", type=Path, help="the text, .txt or .txt.xz")
    add("--validation", action="store_true", help="hold out the validation part, not the test")
    add("--replay", type=float, help="beta: times KL to the base on its own texts, in the loss")
    add("--model", default=MODEL, help="a folder or a name on the hub")
    runs = recipe.planned(options, preset)
    if not runs[0].data and not runs[0].smoke:
        options.error("pass --data, the text to adapt to, or --smoke")
    if runs[0].model == MODEL and not runs[0].smoke and not Path(MODEL).exists():
        options.error(f"there is no {MODEL}: make it with convert_llama2c.py, or pass --model")
    recipe.main(runs, perform)


if __name__ == "__main__":
    main()
