"""Parameters that are divided over ranks.

`fully_shard` (FSDP2) divides them as DTensors, FSDP1 in pieces, and DeepSpeed's ZeRO-3 leaves empty
ones, which know how to be gathered.

They are told by what they have, so that who does not shard does not pay for the import of DTensor.
What only one rank holds is read without asking the others wherever that will do: a question that
one rank asks alone would wait for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def in_processes() -> bool:
    """Whether this is one of several processes that train together, or may be."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds but its part of `tensor`."""
    return hasattr(tensor, "full_tensor")


def is_flattened(module: nn.Module) -> bool:
    """Whether FSDP1 holds the parameters of `module` itself, as parts of a flat one."""
    own = [p for p in module._parameters.values() if p is not None]
    taken = module.__dict__.get("_fsdp_use_orig_params") is False and not own
    return taken or any(getattr(p, "_fsdp_flattened", False) for p in own)


def is_absent(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has taken its values away until somebody gathers them."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


def is_divided(parameters: Iterable[Tensor]) -> bool:
    """Whether each rank has but a part of some, so that all must ask for them together."""
    return any(is_sharded(p) or hasattr(p, "ds_id") for p in parameters)


@contextlib.contextmanager
def present(parameters: Iterable[Tensor]) -> Iterator[None]:
    """With the values of those that ZeRO-3 has taken away. Every rank must call it."""
    absent: list[Any] = [p for p in dict.fromkeys(parameters) if is_absent(p)]
    if absent:
        absent[0].all_gather(param_list=absent)
    try:
        yield
    finally:
        if absent:
            absent[0].partition(param_list=absent)


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


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`."""
    sharded: Any = tensor
    local: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return local


def anywhere(found: Iterable[bool], tensors: Iterable[Tensor]) -> list[bool]:
    """What was found here of each of the tensors; of a sharded one, whether some rank has found it.

    Every rank must call it if some are sharded. One message for all of a mesh.
    """
    everywhere = list(found)
    places: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if is_sharded(tensor):
            sharded: Any = tensor
            places.setdefault(sharded.device_mesh, []).append(place)
    for mesh, own in places.items():
        from torch.distributed.tensor import DTensor, Partial

        here = torch.tensor([float(everywhere[i]) for i in own], device=mesh.device_type)
        largest: Any = DTensor.from_local(here, mesh, [Partial("max")] * mesh.ndim, run_check=False)
        for i, number in zip(own, largest.full_tensor().tolist(), strict=True):
            everywhere[i] = number > 0
    return everywhere


def numbers_here(tensors: Iterable[Tensor]) -> list[float | None]:
    """The elements of each, all in turn, with one transfer from the device they are on.

    None for those that another rank has, or nobody.
    """
    whole = [t.detach() for t in tensors]
    local = [local_part(t) for t in whole]
    there = [t.reshape(-1) for t in local if not t.is_meta and t.numel()]
    found = iter(torch.cat([t.to(there[0].device) for t in there]).tolist() if there else ())
    numbers: list[float | None] = []
    for tensor, own in zip(whole, local, strict=True):
        # What ZeRO-3 has taken away says how much that is.
        here: list[float | None] = [None] * (tensor.numel() or getattr(tensor, "ds_numel", 1))
        if not own.is_meta and own.numel():
            start = _start(tensor)
            here[start : start + own.numel()] = [next(found) for _ in range(own.numel())]
        numbers += here
    return numbers


def _start(tensor: Tensor) -> int:
    """Where what this rank holds of a tensor of one dimension begins in it."""
    if not is_sharded(tensor):
        return 0
    sharded: Any = tensor
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            each = -(-tensor.numel() // sharded.device_mesh.size(dim))
            return int(each * sharded.device_mesh.get_local_rank(dim))
    return 0
