"""Parameters that FSDP2's `fully_shard` has divided over ranks, as DTensors.

They are told by what they have, so that who does not shard does not pay for the import of DTensor.
What only one rank holds is read without asking the others wherever that will do: a question that
one rank asks alone would wait for ever.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds but its part of `tensor`."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """All of `tensor`, differentiably. Every rank of a sharded one must call it."""
    sharded: Any = tensor
    whole: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return whole


def divided_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, of which every rank has all, divided as `parameter` is; without communication."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = parameter
    mesh = sharded.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    divided: Tensor = everywhere.redistribute(placements=sharded.placements)
    return divided


def number_here(tensor: Tensor) -> float | None:
    """The one element of `tensor`; None where another rank has it, or nobody (meta)."""
    sharded: Any = tensor.detach()
    local: Tensor = sharded.to_local() if is_sharded(tensor) else sharded
    return None if local.is_meta or local.numel() == 0 else local.item()
