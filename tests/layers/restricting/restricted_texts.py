"""A small language model, and texts in which some tokens are looked for."""

import inspect

import pytest
import torch
from models import away_from_initialisation, small_llama

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
)
INVOKE = [7, 9]


def llama(gate="threshold", dtype=torch.float32, **options):
    model = small_llama().to(dtype)
    tokengate.patch(model, ["q_proj", "k_proj", "v_proj", "up_proj"], rank=4, gate=gate, **options)
    return away_from_initialisation(model, 0.3)


def ids_with(*places, rows=2, length=12):
    """Tokens without INVOKE, but at these places in the first row."""
    ids = torch.randint(10, 64, (rows, length), generator=torch.Generator().manual_seed(3))
    for place in places:
        ids[0, place : place + 2] = torch.tensor(INVOKE)
    return ids
