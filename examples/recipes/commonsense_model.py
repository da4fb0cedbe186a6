"""The model of commonsense.py and its tokenizer: pretrained, or without any knowledge."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from commonsense_data import Row, prompt
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

MODEL = "meta-llama/Meta-Llama-3-8B"
# Of MODEL, which one has to ask its owner for: a plan and random weights do without.
LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def config_of(run: argparse.Namespace) -> Any:
    """Without a download where it is known."""
    if run.smoke or run.model == MODEL:
        return LlamaConfig(**(TINY if run.smoke else LLAMA_3_8B))
    return AutoConfig.from_pretrained(run.model)


def untrained(run: argparse.Namespace, rows: list[Row]) -> tuple[Any, Any]:
    """A model without any knowledge, and a tokenizer that knows the rows alone."""
    config = config_of(run)
    pieces = ByteLevelBPETokenizer()
    texts = [prompt(row) + row["output"] for row in rows]
    pieces.train_from_iterator(
        texts,
        vocab_size=min(config.vocab_size, 32000),
        special_tokens=["</s>"],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    # Where it is trained: so many random numbers take long on a CPU.
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    with gpu if torch.cuda.is_available() else torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=run.dtype)
    return model, tokenizer


def loaded(run: argparse.Namespace, rows: list[Row]) -> tuple[Any, Any]:
    """The model and its tokenizer, ready to generate."""
    if run.smoke or run.random_weights:
        model, tokenizer = untrained(run, rows)
    else:
        model = AutoModelForCausalLM.from_pretrained(run.model, dtype=run.dtype)
        tokenizer = AutoTokenizer.from_pretrained(run.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # so that a batch of prompts ends where responses begin
    # Not the model's own, which may draw at random.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=run.new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return model, tokenizer
