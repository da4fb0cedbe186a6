"""Count, while a model runs, which positions its gates leave unmodified."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.gated_linear import require_layers
from tokengate.recomputation import in_backward
from tokengate.report import ModuleSparsity, SparsityReport
from tokengate.tally import by_sample, tally

# Of a layer's name and the shape of its S, for each group by name: which of these positions are in
# it, a boolean tensor (B, T) of as many; or True for all of them, False for none.
Groups: TypeAlias = Callable[[str, torch.Size], Mapping[str, Tensor | bool]]


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
        # Per group, where None is all positions, and module, on its device: samples, their summed
        # sparsity, positions, closed positions.
        self._counts: dict[str | None, dict[str, Tensor]] = {}
        self._groups = groups
        self._keep_positions = positions
        self.positions: dict[str, list[Tensor]] = {}

    def report(self) -> SparsityReport:
        """Sparsity (eq. 23) of what was run so far.

        Raises:
            TokenGateError: nothing was run.
        """
        return self._report(None)

    def reports(self) -> dict[str, SparsityReport]:
        """The same for each group of positions, with `record(groups=...)`.

        A sample without a position in a group is no sample of its report. A module that was called
        only with positions of other groups is not in it.

        Raises:
            TokenGateError: nothing was run.
        """
        self._report(None)
        return {group: self._report(group) for group in self._counts if group is not None}

    def _report(self, group: str | None) -> SparsityReport:
        if not self._counts:
            raise TokenGateError(
                "nothing was recorded: run the model inside `with tokengate.record(model):`."
            )
        modules = {}
        for name, gate in self._gates.items():
            samples, summed, positions, closed = 0.0, 0.0, 0.0, 0.0
            if name in self._counts[group]:
                samples, summed, positions, closed = self._counts[group][name].tolist()
            if group is not None and not samples and name in self._counts[None]:
                continue
            modules[name] = ModuleSparsity(
                sparsity=summed / samples if samples else float("nan"),
                samples=int(samples),
                positions=int(positions),
                modified=int(positions - closed),
                tau=None if gate is None else gate.tau.item(),
            )
        return SparsityReport(modules)

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
        now = tally(closed, real)
        so_far = self._counts.setdefault(group, {})
        so_far[name] = so_far[name] + now if name in so_far else now


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
    added = {}
    try:
        for name, layer in recorder._layers.items():
            added[layer] = partial(recorder._observe, name)
            layer._observers = (*layer._observers, added[layer])
        yield recorder
    finally:
        for layer, observer in added.items():
            # From the instance: the layer may have been unpatched in the meantime.
            left = tuple(o for o in layer.__dict__.pop("_observers", ()) if o is not observer)
            if left:
                layer._observers = left
