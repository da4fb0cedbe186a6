"""Count, while a model runs, which positions its gates leave unmodified."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError, brief
from tokengate.gated_linear import observing, require_layers
from tokengate.recomputation import in_backward
from tokengate.report import ModuleSparsity, SparsityReport
from tokengate.sharding import number_here
from tokengate.tally import by_sample, tally

# Of a layer's name and the shape of its S, for each group by name: which of these positions are in
# it, a boolean tensor (B, T) of as many; or True for all of them, False for none.
Groups: TypeAlias = Callable[[str, torch.Size], Mapping[str, Tensor | bool]]

# Per group, where None is all positions, and module: samples, their summed sparsity, positions,
# closed positions.
_Counts: TypeAlias = dict[str | None, dict[str, Tensor]]
# tau of every module; None without a gate, and where another rank has it.
_Taus: TypeAlias = dict[str, float | None]


class Recorder:
    """What `record` collects. Read it with `report()`, during the recording or after it.

    Attributes:
        positions: with `record(positions=True)`, for every module the list of its S, one boolean
            tensor of shape `(...)` on the CPU for each call; otherwise empty.
    """

    def __init__(
        self, model: nn.Module, positions: bool = False, groups: Groups | None = None
    ) -> None:
        self._layers = require_layers(model, "record")
        # Apart from the layers, which may have been unpatched when the report is made.
        self._gates = {name: layer.gate for name, layer in self._layers.items()}
        # On the modules' devices.
        self._counts: _Counts = {}
        self._groups = groups
        self._keep_positions = positions
        self.positions: dict[str, list[Tensor]] = {}

    def report(self, reduce: bool | Any = False) -> SparsityReport:
        """Sparsity (eq. 23) of what was run so far.

        Args:
            reduce: True adds up what was run on all ranks of `torch.distributed`, a process group
                what was run on its ranks, each of which must call this, whether it ran anything or
                not; all get the same report. Where there is one process, it is that one's.

        Raises:
            TokenGateError: nothing was run; `reduce` is something else.
        """
        counts, taus = self._collect(reduce)
        return _report(counts, taus, None)

    def reports(self, reduce: bool | Any = False) -> dict[str, SparsityReport]:
        """The same for each group of positions, with `record(groups=...)`.

        A sample without a position in a group is no sample of its report. A module that was called
        only with positions of other groups is not in it.

        Args:
            reduce: as in `report`.

        Raises:
            TokenGateError: nothing was run; `reduce` is something else.
        """
        counts, taus = self._collect(reduce)
        return {group: _report(counts, taus, group) for group in counts if group is not None}

    def _collect(self, reduce: bool | Any) -> tuple[_Counts, _Taus]:
        """What was counted, here or on all ranks, and the taus, or an error if nothing was."""
        taus = {n: None if g is None else number_here(g.tau) for n, g in self._gates.items()}
        found = [(self._counts, taus)]
        if reduce is not False:
            found = _of_all_ranks(self._counts, taus, reduce)
        counts: _Counts = {}
        for own, own_taus in found:
            for group, modules in own.items():
                _add(counts.setdefault(group, {}), modules)
            for name, tau in own_taus.items():
                if taus.get(name) is None:
                    taus[name] = tau
        if not counts:
            raise TokenGateError(
                "nothing was recorded: run the model inside `with tokengate.record(model):`."
            )
        return counts, taus

    def _observe(self, name: str, is_open: Tensor | None, h: Tensor, mask: Tensor | None) -> None:
        if not torch.compiler.is_compiling() and in_backward():
            return  # activation checkpointing computes again what was counted in the forward
        with torch.no_grad():
            if is_open is None:
                is_open = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
            if self._keep_positions:
                self.positions.setdefault(name, []).append(is_open.cpu())
            if is_open.numel() == 0:
                return
            closed, real = by_sample(is_open, mask)
            groups = {} if self._groups is None else self._groups(name, is_open.shape)
            self._count(None, name, closed, real)
            for group, inside in groups.items():
                if isinstance(inside, Tensor):
                    closed, real = closed.reshape(inside.shape), real.reshape(inside.shape)
                    inside = inside.to(real.device)
                self._count(group, name, closed, real & inside)

    def _count(self, group: str | None, name: str, closed: Tensor, real: Tensor) -> None:
        """Add the `real` positions, `(B, T)` as those that are `closed`, to a group's."""
        _add(self._counts.setdefault(group, {}), {name: tally(closed, real)})


def _add(so_far: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, counts in more.items():
        so_far[name] = so_far[name] + counts if name in so_far else counts


def _of_all_ranks(counts: _Counts, taus: _Taus, reduce: Any) -> list[tuple[_Counts, _Taus]]:
    """What every rank has counted, and the taus that it has."""
    distributed = torch.distributed
    there = distributed.is_available()
    if reduce is not True and not (there and isinstance(reduce, distributed.ProcessGroup)):
        raise TokenGateError(
            f"reduce={brief(reduce)} was asked: pass True, False, or a process group of "
            "torch.distributed."
        )
    if not (there and distributed.is_initialized()):
        return [(counts, taus)]
    group = None if reduce is True else reduce
    # As objects, because a rank that had nothing to run knows neither modules nor groups of
    # positions; and one rank at a time, so that all of them add up in the same order.
    mine = {g: {n: c.cpu() for n, c in modules.items()} for g, modules in counts.items()}
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, (mine, taus), group=group)
    return found


def _report(counts: _Counts, taus: _Taus, group: str | None) -> SparsityReport:
    modules = {}
    for name, tau in taus.items():
        samples, summed, positions, closed = 0.0, 0.0, 0.0, 0.0
        if name in counts[group]:
            samples, summed, positions, closed = counts[group][name].tolist()
        if group is not None and not samples and name in counts[None]:
            continue
        modules[name] = ModuleSparsity(
            sparsity=summed / samples if samples else float("nan"),
            samples=int(samples),
            positions=int(positions),
            modified=int(positions - closed),
            tau=tau,
        )
    return SparsityReport(modules)


@contextlib.contextmanager
def record(
    model: nn.Module, positions: bool = False, groups: Groups | None = None
) -> Iterator[Recorder]:
    """Measure sparsity (eq. 23) of a patched model while it runs:

        with tokengate.record(model) as rec:
            model(**batch)
        print(rec.report())

    Per module: for each sample, the share of its positions that were left unmodified, averaged
    over samples. Positions that the model's own `attention_mask` pads are not counted. Layers
    without a gate modify every position: their sparsity is 0. May be nested.

    Args:
        model: a patched model.
        positions: also keep S itself, in `rec.positions`; one byte for each position and module.
        groups: also count apart what this function tells apart, for `rec.reports()`. At each call
            of a layer it is given the layer's name and the shape of its S, and returns for every
            group, by name, which positions are in it: a boolean tensor `(B, T)` of as many, True
            for all of them, or False.

    Raises:
        TokenGateError: no layer of the model is patched.
    """
    recorder = Recorder(model, positions, groups)
    observers = {
        layer: partial(recorder._observe, name) for name, layer in recorder._layers.items()
    }
    with observing(observers):
        yield recorder
