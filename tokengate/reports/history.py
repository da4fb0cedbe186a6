"""How tau and sparsity went while a model was trained (the paper's Figure 9)."""

from __future__ import annotations

import copy
import json
import math
import statistics
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokengate.arguments import count, unused
from tokengate.errors import TokenGateError, brief
from tokengate.files.atomic_write import write_text
from tokengate.files.strict_json import read
from tokengate.layers.patched import module_names
from tokengate.reports.module_sparsity import LARGEST_TAU
from tokengate.reports.report import SparsityReport, check_report
from tokengate.sharding import numbers_here
from tokengate.training.thresholds import with_threshold

# One value for each step that was kept; None where there was none, or none that is finite.
Course = list[float | None]


class History:
    """The tau of every gate, its sparsity and the loss, at some of the steps of a training:

        history = tokengate.History(model)
        for step, batch in enumerate(loader, 1):
            with tokengate.record(model) as rec:
                loss = model(**batch).loss
            ...
            if step % 10 == 0:
                history.log(step, loss=loss, report=rec.report())
        history.save("history.json")

    A call of `log` waits for the device once, however many gates there are, and costs nothing
    between two calls. What is kept is bounded: when there are `limit` steps, every second one is
    forgotten, and from there on only every second call of `log` counts (then every fourth...).

    Attributes:
        steps: the steps that were kept, ascending.
        losses: the loss at each of them.
        taus: by module, its tau at each of them.
        sparsities: by module, its sparsity (eq. 23) in [0, 1] at each of them.
        skipped: of all gates together, how many gradients that were not finite an optimiser has
            skipped up to each of them.
        broken: by module whose tau was not finite, the first such step that was logged.

    Args:
        model: a patched model; its layers without a gate have no tau and are left out.
        limit: how many steps are kept at most.

    Raises:
        TokenGateError: no layer of the model has a gate; `limit` is no whole number >= 2.
    """

    steps: list[int]
    losses: Course
    taus: dict[str, Course]
    sparsities: dict[str, Course]
    skipped: list[int]
    broken: dict[str, int]
    # Of the calls of `log` every so many counts, and so many have yet to be passed over.
    _stride: int = 1
    _skip: int = 0

    def __init__(self, model: nn.Module, limit: int = 1000) -> None:
        self._start(_gates(model), count("limit", limit, least=2))

    @property
    def sparsity(self) -> Course:
        """At each step that was kept, the average over the modules that were called (eq. 23)."""
        columns = self.sparsities.values()
        found = [[x for c in columns if (x := c[i]) is not None] for i in range(len(self.steps))]
        return [statistics.fmean(called) if called else None for called in found]

    def log(
        self,
        step: int,
        *,
        loss: Tensor | float | None = None,
        report: SparsityReport | None = None,
    ) -> None:
        """Keep where the taus are at `step`, with that step's loss and sparsity if they are given.

        A `step` that is not after the last one, as when a training goes on from a checkpoint,
        takes the place of what was kept from there on.

        Raises:
            TokenGateError: `step` is no whole number >= 0; `loss` is not one number; `report` is
                no report; the history was loaded without a model.
        """
        count("step", step, least=0)
        if self._gates is None:
            raise TokenGateError(
                "log was asked of a history that was loaded without a model: pass one, "
                "tokengate.History.load(path, model)."
            )
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise TokenGateError(
                f"loss has shape {tuple(loss.shape)}: pass one number, e.g. loss.mean()."
            )
        if not isinstance(loss, Tensor | Real | None):
            raise TokenGateError(f"loss={brief(loss)} is no number: pass one, or None.")
        measured = {} if report is None else check_report("History.log", report).by_module
        if self.steps and step <= self.steps[-1]:
            after = next(i for i, kept in enumerate(self.steps) if kept >= step)
            self._forget(slice(after, None))
            self.broken = {name: first for name, first in self.broken.items() if first < step}
        elif self._skip:
            self._skip -= 1
            return
        while len(self.steps) >= self._limit:
            self._forget(slice(1, None, 2))
            self._stride *= 2
        self._skip = self._stride - 1

        gates = dict.fromkeys(self._gates.values())
        taus = [gate.threshold for gate in gates]
        if isinstance(loss, Tensor):
            *found, loss = numbers_here([*taus, loss])
        else:
            found = numbers_here(taus)
        self.steps.append(step)
        self.losses.append(_finite(loss))
        self.skipped.append(sum(gate.skipped for gate in gates))
        for name, tau in zip(self._gates, found, strict=True):
            self.taus[name].append(_finite(tau))
            if tau is not None and not math.isfinite(tau):
                self.broken.setdefault(name, step)
            self.sparsities[name].append(_finite(measured.get(name)))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; what went wrong only where something did."""
        found: dict[str, Any] = {
            "steps": self.steps,
            "losses": self.losses,
            "taus": self.taus,
            "sparsities": self.sparsities,
        }
        if any(self.skipped):
            found["skipped"] = self.skipped
        if self.broken:
            found["broken"] = self.broken
        return copy.deepcopy(found)  # which `log` does not add to

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all; `History.load` reads it.

        Raises:
            TokenGateError: `path` is a folder.
            OSError: the file cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), allow_nan=False))

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module | None = None, limit: int | None = None
    ) -> History:
        """What `save` wrote; with the model, `log` goes on from there, within `limit` steps.

        Raises:
            TokenGateError: the file is not one that `save` wrote, or is of another model.
        """
        if model is None:
            unused("History.load", "without a model", limit=limit)
        found = read(path, "history")
        if not _is_whole(found):
            raise TokenGateError(f"{path} holds no history: pass a file that History.save wrote.")
        gates = None if model is None else _gates(model)
        if gates is not None and set(gates) != set(found["taus"]):
            name = min(set(gates) ^ set(found["taus"]))
            raise TokenGateError(
                f"{'the model' if name in gates else str(path)!r} alone has a gate in {name!r}: "
                "patch the model as it was patched when the history was saved."
            )
        history = cls.__new__(cls)
        history._start(gates, 1000 if limit is None else count("limit", limit, least=2))
        vars(history).update({"skipped": [0] * len(found["steps"]), **found})
        return history

    def _start(self, gates: dict[str, Any] | None, limit: int) -> None:
        names = gates or {}
        self._gates, self._limit = gates, limit
        self.steps, self.losses, self.skipped, self.broken = [], [], [], {}
        self.taus, self.sparsities = {n: [] for n in names}, {n: [] for n in names}

    def _forget(self, which: slice) -> None:
        columns: list[list[Any]] = [self.steps, self.losses, self.skipped]
        for column in (*columns, *self.taus.values(), *self.sparsities.values()):
            del column[which]


def _gates(model: nn.Module) -> dict[str, Any]:
    return {
        own: layer.gate
        for name, (layer, _) in with_threshold("History", model).items()
        for own in module_names(name, layer)
    }


def _finite(number: Any) -> float | None:
    return None if number is None or not math.isfinite(number) else float(number)


def _is_whole(found: Any) -> bool:
    """Whether it is what `to_dict` returns, whatever was in the file."""
    try:
        steps, taus, sparsities = found["steps"], found["taus"], found["sparsities"]
        skipped, broken = found.get("skipped", [0] * len(steps)), found.get("broken", {})
        columns = [found["losses"], skipped, *taus.values(), *sparsities.values()]
        return bool(
            found.keys() - {"skipped", "broken"} == {"steps", "losses", "taus", "sparsities"}
            and broken.keys() <= taus.keys()
            and all(type(count) is int and count >= 0 for count in (*skipped, *broken.values()))
            and taus.keys() == sparsities.keys()
            and all(type(step) is int for step in steps)
            and steps == sorted(set(steps))
            and all(isinstance(c, list) and len(c) == len(steps) for c in columns)
            and all(x is None or type(x) in (int, float) for c in columns for x in c)
            and all(
                x is None or abs(x) <= most
                for most, own in ((LARGEST_TAU, taus), (1, sparsities))
                for c in own.values()
                for x in c
            )
        )
    except (AttributeError, KeyError, OverflowError, TypeError):
        return False
