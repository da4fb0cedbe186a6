"""The rows that AdaLoRA pruned, of which PEFT keeps a mask and no values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tokengate import TokenGateError
from tokengate.adapters.weights import DTYPES, Weights
from tokengate.errors import brief
from tokengate.files.text_table import size
from tokengate.integrations.hf_peft.format import KEYS, PREFIX

# What AdaLoRA's pruned rows may take: so many bytes, or so many times as much as was kept.
_LEAST_UNPRUNED, _MOST_UNPRUNED = 16 << 20, 16


def masks(config: dict[str, Any], found: Collection[str], where: str) -> dict[str, list[bool]]:
    """Which of the initial rows the layers still have that have not all of them."""
    rank, layers = config.get("init_r", 12), frozenset(found)
    masks = {}
    for key, mask in (config.get("rank_pattern") or {}).items():
        layer, _, part = key.rpartition(".")
        if part != "lora_E" or layer not in layers:
            raise TokenGateError(
                f"{where} has a rank_pattern for {key!r}, which is no layer of the adapter: save "
                "it again."
            )
        fits = isinstance(mask, list) and len(mask) == rank
        if not fits or not all(isinstance(kept, bool) for kept in mask):
            raise TokenGateError(
                f"{where} has {brief(mask)} as the rank_pattern of {key!r}, which is not "
                f"init_r={rank} times true or false: save the adapter again."
            )
        masks[layer] = mask
    return masks


def check_unpruned(weights: Weights, masks: dict[str, list[bool]], where: str) -> None:
    """An error if the rows that AdaLoRA pruned would take far more memory than those it kept.

    A mask is a few bytes for each row, and a row is as long as the layer is wide.
    """
    held = sum(weights.sizes.values())
    wanted = 0
    for layer, mask in masks.items():
        p, e, q = (f"{PREFIX}{layer}.{suffix}" for suffix in KEYS["adalora"].values())
        row = weights.tensors[p].shape[0] + 1 + weights.tensors[q].shape[1]
        wanted += len(mask) * row * DTYPES[weights.tensors[e].dtype].itemsize
    if wanted > max(_LEAST_UNPRUNED, _MOST_UNPRUNED * held):
        raise TokenGateError(
            f"{where} asks for {size(wanted)} of rows that were pruned or kept, of which "
            f"{str(weights.path)!r} holds {size(held)}: save the adapter again with a smaller "
            "init_r."
        )


def unpruned(own: dict[str, Tensor], mask: list[bool] | None) -> dict[str, Tensor]:
    """P, E and Q with the pruned rows, which contribute nothing, back in their places."""
    if mask is None:
        return {**own, "E": own["E"][:, 0]}
    kept = torch.tensor(mask, dtype=torch.bool)
    full = {
        "P": own["P"].new_zeros(len(own["P"]), len(mask)),
        "E": own["E"].new_zeros(len(mask)),
        "Q": own["Q"].new_zeros(len(mask), own["Q"].shape[1]),
    }
    full["P"][:, kept], full["E"][kept], full["Q"][kept] = own["P"], own["E"][:, 0], own["Q"]
    return full
