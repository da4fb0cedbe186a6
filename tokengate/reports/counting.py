"""What a recording has counted: checked, added up over ranks, and made into a report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokengate.errors import TokenGateError, brief
from tokengate.gates.base import Gate
from tokengate.reports.module_sparsity import ModuleSparsity
from tokengate.reports.position_counts import PositionCounts
from tokengate.reports.report import SparsityReport
from tokengate.reports.tables.sparsity_table import value
from tokengate.sharding import in_processes, numbers_here

# Of a layer's name and the shape of its S, for each group by name: which of these positions are in
# it, a boolean tensor (B, T) of as many; or True for all of them, False for none.
Groups: TypeAlias = Callable[[str, torch.Size], Mapping[str, Tensor | bool]]

# Per group, where None is all positions, and module: samples, their summed sparsity, positions,
# closed positions; then, where they were asked for, how often r is where.
Counts: TypeAlias = dict[str | None, dict[str, Tensor]]
# tau of every module; None without a gate, and where another rank has it.
Taus: TypeAlias = dict[str, float | None]
# By module, where positions are kept.
Details: TypeAlias = dict[str, PositionCounts]
Found: TypeAlias = tuple[Counts, Taus, Details]


def checked_groups(found: Any, name: str, shape: torch.Size) -> Mapping[str, Tensor | bool]:
    """What a `groups` function returned of a layer with an S of this shape, or an error."""

    def fits(inside: Any) -> bool:
        if isinstance(inside, Tensor):
            same = inside.numel() == shape.numel()
            return same and inside.dim() == 2 and inside.dtype == torch.bool
        return isinstance(inside, bool)

    if not isinstance(found, Mapping) or not all(map(fits, found.values())):
        raise TokenGateError(
            f"groups returned {brief(found)} of {name!r}, whose S has shape {tuple(shape)}: return "
            "for every group, by name, True, False, or a boolean tensor (B, T) of as many."
        )
    return found


def add_counts(so_far: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add one group's counts to those there are, module by module."""
    for name, counts in more.items():
        so_far[name] = so_far[name] + counts if name in so_far else counts


def taus_of(
    names: Mapping[str, list[str]],
    parts: Mapping[str, tuple[Any, Gate | None]],
    counted: Collection[str],
) -> Taus:
    """tau of every module that the report is of: a part of what is in use, or counted.

    What only another adapter modifies, as that of a row, has no tau that were the module's.

    Args:
        names: of the modules that each layer is, in the model's order.
        parts: what each layer has of the adapter in use, if it has any.
        counted: the modules of which something was.
    """
    found: Taus = {}
    for layer, modules in names.items():
        if layer not in parts:
            found |= {name: None for name in modules if name in counted}
            continue
        _, gate = parts[layer]
        threshold = None if gate is None else gate.threshold
        taus = [None] * len(modules) if threshold is None else numbers_here([threshold])
        found |= dict(zip(modules, taus, strict=True))
    return found


def of_all_ranks(mine: Found, reduce: Any, asked: dict[str, bool]) -> list[Found]:
    """What every rank has counted, and the taus that it has; all must have `asked` for the same."""
    distributed = torch.distributed
    there = distributed.is_available()
    if reduce is not True and not (there and isinstance(reduce, distributed.ProcessGroup)):
        raise TokenGateError(
            f"reduce={brief(reduce)} was asked: pass True, False, or a process group of "
            "torch.distributed."
        )
    if not in_processes():
        return [mine]
    group = None if reduce is True else reduce
    # As objects, because a rank that had nothing to run knows neither modules nor groups of
    # positions; and one rank at a time, so that all of them add up in the same order.
    counts, taus, details = mine
    counts = {g: {n: c.cpu() for n, c in modules.items()} for g, modules in counts.items()}
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, (asked, counts, taus, details), group=group)
    for option in asked:
        if len({options[option] for options, *_ in found}) > 1:
            raise TokenGateError(
                f"the ranks recorded with {option}=True on some of them alone: pass the same to "
                "record on all ranks, or report without reduce."
            )
    return [(counts, taus, details) for _, counts, taus, details in found]


def made_report(found: Found, group: str | None, about: dict[str, str]) -> SparsityReport:
    """What was counted of a group of positions, where None is all, as a report."""
    counts, taus, details = found
    modules = {}
    for name, tau in taus.items():
        samples, summed, positions, closed = 0.0, 0.0, 0.0, 0.0
        ratios: list[float] = []
        if name in counts[group]:
            samples, summed, positions, closed, *ratios = counts[group][name].tolist()
        if group is not None and not samples and name in counts[None]:
            continue
        detail = details.get(name) if group is None else None
        modules[name] = ModuleSparsity(
            sparsity=summed / samples if samples else float("nan"),
            samples=int(samples),
            positions=int(positions),
            modified=int(positions - closed),
            tau=tau,
            # Without a gate, nothing was counted.
            ratios=tuple(map(int, ratios)) if any(ratios) else None,
            by_sample=None if detail is None else tuple(map(value, detail.by_sample)),
            by_position=None if detail is None else detail.by_position(),
        )
    return SparsityReport(modules, about)
