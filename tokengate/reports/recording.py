"""Count, while a model runs, which positions its gates leave unmodified."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.arguments import count, switch, unused
from tokengate.contexts import context
from tokengate.errors import TokenGateError, brief
from tokengate.gates.deciding import Observer
from tokengate.gates.tally import by_sample, tally
from tokengate.kernels.norms import Norms
from tokengate.kernels.norms import ratios as ratios_of
from tokengate.kernels.recomputation import is_computed_again
from tokengate.layers.calls import RECORD, in_context
from tokengate.layers.coverage import report_lost
from tokengate.layers.patched import all_layers, module_names, observers, require_layers
from tokengate.reports.call_store import CallStore, KeptCalls
from tokengate.reports.counting import (
    Counts,
    Details,
    Found,
    Groups,
    add_counts,
    checked_groups,
    made_report,
    of_all_ranks,
    taus_of,
)
from tokengate.reports.histogram import count_ratios
from tokengate.reports.position_counts import PositionCounts
from tokengate.reports.provenance import name_of_model, provenance
from tokengate.reports.report import SparsityReport
from tokengate.reports.samples import Sample, Samples, alike, only, within

# Bytes of positions and ratios that stay in memory, if `record` is not told otherwise: 256 MiB.
_MEMORY = 2**28


class Recorder:
    """What `record` collects. Read it with `report()`, during the recording or after it.

    Attributes:
        positions: with `record(positions=True)`, for every module the list of its S, one boolean
            tensor of shape `(...)` on the CPU for each call; otherwise an error. A module's list is
            made when it is asked for.
        ratios: with `record(positions=True, ratios=True)`, the same of r = ||M(x)|| / ||W0 x||
            (eq. 4) in float16, for every module that has a gate: to 0.05 % from 6e-5 on and to
            3e-8 below; what is above 65,504, and r where no tau closes the gate, is infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        positions: bool = False,
        groups: Groups | None = None,
        ratios: bool = False,
        memory: int | None = None,
        folder: Path | str | None = None,
    ) -> None:
        in_use = require_layers(model, "record")
        # Those, too, that other adapters modify, which rows, regions or a context within may use.
        self._layers = all_layers(model)
        # Apart from the layers, which may have been unpatched when the report is made.
        self._parts = {n: (layer.modification, layer.gate) for n, layer in in_use.items()}
        self._names = {n: module_names(n, layer) for n, layer in self._layers.items()}
        self._model = name_of_model(model)
        # Threads may have been given its context.
        self._lock = threading.Lock()
        # On the modules' devices.
        self._counts: Counts = {}
        self._details: Details = {}
        if groups is not None and not callable(groups):
            raise TokenGateError(
                f"groups={brief(groups)} is no function: pass one of a layer's name and the shape "
                "of its S."
            )
        self._groups = groups
        self._asked_ratios = switch("ratios", ratios)
        if not switch("positions", positions):
            unused("record", "without positions=True", memory=memory, folder=folder)
        most = _MEMORY if memory is None else count("memory", memory)
        self._calls = store = CallStore(most, folder) if positions else None
        self.positions: Mapping[str, list[Tensor]] = KeptCalls(store, CallStore.is_open)
        self.ratios: Mapping[str, list[Tensor]] = KeptCalls(
            store if ratios else None, CallStore.ratios, CallStore.has_ratios, "ratios"
        )

    @property
    def alike(self) -> list[Samples]:
        """The samples in each set of modules that were called alike, the largest set first.

        A vision tower and a language model make two of them, and so do layers before and after
        patches are merged; an expert, which sees the positions that a router sends there one by
        one, is alone with itself.

        Raises:
            TokenGateError: no positions were kept.
        """
        if self._calls is None or not self.positions:
            raise TokenGateError(
                "no positions were recorded: run the model inside `with tokengate.record(model, "
                "positions=True):`."
            )
        names = [each for names in self._names.values() for each in names]
        called = [name for name in names if name in self.positions]
        return alike(self._calls, called, self._asked_ratios)

    @property
    def samples(self) -> Samples:
        """All samples, in the order of calls and, within a call, of its rows: see `sample`.

        Raises:
            TokenGateError: no positions were kept; the modules were not all called alike.
        """
        return only(self.alike)

    def sample(self, index: int, modules: Collection[str] | None = None) -> Sample:
        """One sample in all modules: S, r and padding of its T positions.

        Samples are what the report counts: each row of each call. What `generate` computes one
        token at a time with a cache is in each call a sample of one position; run the whole text
        once to see it as one. Of positions without samples, `(N,)`, each is one, unless the
        padding mask tells the samples.

        Args:
            index: of the sample, in the order of calls and, within a call, of its rows.
            modules: in these alone, which must have been called alike: as often, and with as many
                samples, as long and as padded. None: all that were called.

        Raises:
            TokenGateError: no positions were kept; a module was not called; the modules were not
                called alike; there is no such sample.
        """
        samples = self.samples if modules is None else only(within(self.alike, modules))
        if not isinstance(index, Integral) or not -len(samples) <= index < len(samples):
            raise TokenGateError(
                f"sample {brief(index)} was asked of a recording of {len(samples)}: pass an index "
                "below that."
            )
        return samples[int(index)]

    def report(self, reduce: bool | Any = False) -> SparsityReport:
        """Sparsity (eq. 23) of what was run so far.

        Args:
            reduce: True adds up what was run on all ranks of `torch.distributed`, a process group
                what was run on its ranks, each of which must call this, whether it ran anything or
                not; all get the same report. Where there is one process, it is that one's.

        Raises:
            TokenGateError: nothing was run; `reduce` is something else; the ranks were not all
                recorded with the same `positions` and `ratios`.
        """
        return made_report(self._collect(reduce), None, provenance(self._model, self._parts))

    def reports(self, reduce: bool | Any = False) -> dict[str, SparsityReport]:
        """The same for each group of positions, with `record(groups=...)`.

        A sample without a position in a group is no sample of its report. A module that was called
        only with positions of other groups is not in it. What `positions` adds to a report, by
        sample and by place in the sequence, is of all positions together, and not in these.

        Args:
            reduce: as in `report`.

        Raises:
            TokenGateError: as in `report`.
        """
        found, about = self._collect(reduce), provenance(self._model, self._parts)
        return {
            group: made_report(found, group, about | {"positions": group})
            for group in found[0]
            if group is not None
        }

    def _collect(self, reduce: bool | Any) -> Found:
        """What was counted, here or on all ranks, and the taus, or an error if nothing was."""
        taus = taus_of(self._names, self._parts, self._counts.get(None, {}))
        found = [(self._counts, taus, self._details)]
        if reduce is not False:
            asked = {"positions": self._calls is not None, "ratios": self._asked_ratios}
            found = of_all_ranks(found[0], reduce, asked)
        counts: Counts = {}
        details: Details = {}
        for own, own_taus, own_details in found:
            for group, modules in own.items():
                add_counts(counts.setdefault(group, {}), modules)
            taus |= {name: tau for name, tau in own_taus.items() if taus.get(name) is None}
            for name, detail in own_details.items():
                details.setdefault(name, PositionCounts()).extend(detail)
        if not counts:
            raise TokenGateError(
                "nothing was recorded: run the model inside `with tokengate.record(model):`."
            )
        return counts, taus, details

    def _observe(
        self,
        name: str,
        is_open: Tensor | None,
        h: Tensor,
        mask: Tensor | None,
        norms: tuple[Norms, Norms] | None,
    ) -> None:
        if not torch.compiler.is_compiling() and is_computed_again():
            return  # activation checkpointing computes again what was counted in the forward
        with torch.no_grad(), self._alone():
            ratios = None
            if is_open is None:
                is_open = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
            elif self._asked_ratios:
                if norms is None:
                    raise TokenGateError(
                        f"record(ratios=True) cannot tell r of {name!r}, which has an adapter for "
                        "each row: record with one adapter in use."
                    )
                ratios = ratios_of(*norms)
            closed, real = by_sample(is_open, mask)
            groups: Mapping[str, Tensor | bool] = {}
            if self._groups is not None and is_open.numel():
                groups = checked_groups(self._groups(name, is_open.shape), name, is_open.shape)
            if self._calls is not None:
                _keep(self._calls, self._details, name, is_open, real, ratios)
            if is_open.numel() == 0:
                return
            self._count(None, name, closed, real, ratios)
            for group, inside in groups.items():
                shape = real.shape
                if isinstance(inside, Tensor):
                    shape, inside = inside.shape, inside.to(real.device)
                self._count(
                    group, name, closed.reshape(shape), real.reshape(shape) & inside, ratios
                )

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock

    def _count(
        self, group: str | None, name: str, closed: Tensor, real: Tensor, ratios: Tensor | None
    ) -> None:
        """Add the `real` positions, `(B, T)` as those that are `closed`, to a group's."""
        counts = tally(closed, real)
        if self._asked_ratios:
            counts = torch.cat([counts, count_ratios(ratios, real)])
        add_counts(self._counts.setdefault(group, {}), {name: counts})


# Compiled code would be compiled anew for every call, which finds more of them kept than the last.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _keep(
    calls: CallStore,
    details: Details,
    name: str,
    is_open: Tensor,
    real: Tensor,
    ratios: Tensor | None,
) -> None:
    is_open, real = calls.add(name, is_open, real, ratios)
    details.setdefault(name, PositionCounts()).add(~is_open, real)


@context
def record(
    model: nn.Module,
    positions: bool = False,
    groups: Groups | None = None,
    *,
    ratios: bool = False,
    trained: bool = False,
    memory: int | None = None,
    folder: Path | str | None = None,
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
        positions: also keep S itself, in `rec.positions` and `rec.sample`; one bit for each
            position and module, and 40 bytes for each call of one. The report then has sparsity by
            sample and by place in the sequence, too. Compiled code has a graph break
            there, so that `fullgraph=True` refuses it.
        groups: also count apart what this function tells apart, for `rec.reports()`. At each call
            of a layer it is given the layer's name and the shape of its S, and returns for every
            group, by name, which positions are in it: a boolean tensor `(B, T)` of as many, True
            for all of them, or False.
        ratios: also measure r = ||M(x)|| / ||W0 x|| (eq. 4), where there is a gate; without one,
            nothing is compared. The report then has its histogram. With `positions`, r is kept
            beside S in `rec.ratios`, in 16 bits.
        trained: leave out what is run without gradients: of a training step, what it generates to
            learn from afterwards, and what a reference model answers.
        memory: how many bytes of what is kept may stay in memory, 256 MiB by default; what is more
            goes to a temporary file, which nobody else sees and which goes with the recorder.
        folder: an existing one for that file; None is the system's for temporary files.

    Raises:
        TokenGateError: no layer of the model is patched; an argument is wrong. With `ratios`, in a
            forward: a layer has an adapter for each row.
    """
    recorder = Recorder(model, positions, groups, ratios, memory, folder)
    switch("trained", trained)
    report_lost(model)
    with in_context(
        RECORD,
        observers(
            recorder._layers,
            lambda name: Observer(partial(recorder._observe, name), norms=ratios, trained=trained),
        ),
    ):
        yield recorder
