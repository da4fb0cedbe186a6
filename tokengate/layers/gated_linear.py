"""The patched layer: a frozen linear layer with a modification and a gate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.gates.base import Gate
from tokengate.gates.positions import Positions
from tokengate.kernels.change import Change
from tokengate.kernels.factors import Factors
from tokengate.kernels.gated_sum import without_bias
from tokengate.kernels.norms import Norms, reshaped
from tokengate.kernels.recomputation import MaskMemory, in_backward
from tokengate.layers.regions import ACTIVE, Regional
from tokengate.layers.regions import inside as allowed
from tokengate.layers.rows import Rows
from tokengate.linears.accelerate_hooks import check_resident
from tokengate.linears.class_swap import Swapped, swap, swap_back
from tokengate.linears.linear_like import LinearLike
from tokengate.methods.base import Modification


@dataclass(frozen=True, eq=False)
class Observer:
    """Who is told of each call of a layer.

    Attributes:
        tell: is given S, of shape (...), or None where there is no gate; the output, of shape
            (..., out_features); the padding mask of its positions, (B, T), or None; and the norms
            of m and of w in S's shape, or None where rows have adapters of their own or nobody
            wants them. The samples come first, also where the layer has them second.
        norms: whether these norms are wanted.
    """

    tell: Callable[[Tensor | None, Tensor, Tensor | None, tuple[Norms, Norms] | None], None]
    norms: bool = False


# What only an active context puts on a layer; a copy made meanwhile does not have it.
_TRANSIENT = ("_enabled", "_observers", "_rows")
# What it may have from `patch` on, and so has a copy.
_LASTING = ("_memory", "_sequence_first", "_adapters", "_in_use")
# What a layer has from the start, and a copy anew.
_FRESH = {"_reached": False, "_mask": None, "_mask_from": None, "_others": None}


class Gated(Swapped):
    """h = W0 x + S M(x) + b (eq. 2), `(..., in_features) -> (..., out_features)`.

    Never constructed: `patch` gives an existing linear layer this class and two children, so
    the object, its `weight` and its `bias` stay what and where they were.

    Attributes:
        modification: M.
        gate: the gate S, or None where every position is modified (`gate=False`).
    """

    bias: Any
    # None in a layer that the adapter in use does not modify; such a layer is not in `layers`.
    modification: Modification
    gate: Gate | None

    # All of its adapters by name, where it has had several; and which of them is in use.
    _adapters: dict[str, Any] | None = None
    _in_use: str | None = "default"
    # While one batch has rows, or regions, of several adapters: which.
    _rows: Rows | Regional | None = None

    # Set on the instance only while `disabled` or `record` is active.
    _enabled: bool = True
    _observers: tuple[Observer, ...] = ()
    # While a module around it runs that received an attention mask: that mask, (B, T), and what
    # stands for the module; and in cross-attention what k and v are made of, with its own mask,
    # and the module that said so.
    _mask: Tensor | None = None
    _mask_from: object | None = None
    _others: tuple[Tensor, Tensor | None, nn.Module] | None = None
    _memory: MaskMemory
    # Whether its input is (T, B, in_features) instead of (B, T, in_features).
    _sequence_first: bool = False
    # Whether it was ever called; not kept in compiled code.
    _reached: bool = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(..., in_features) -> (..., out_features)`."""
        if not torch.compiler.is_compiling() and not self._reached:
            self._reached = True
        if not self._enabled or (self.modification is None and self._rows is None):
            untouched: Tensor = super().forward(input, *args, **kwargs)
            return untouched
        x, factors = self._before(input)
        out: Tensor = super().forward(x, *args, **kwargs)
        mask, inside, *parts = self._told_of(input)
        norms = None
        if self._rows is None:
            h, is_open, norms = self._modified(
                input, out, mask, inside, self.modification, self.gate, factors
            )
        elif isinstance(self._rows, Regional):
            h, is_open = self._modified_by_region(input, out, mask, inside, parts, self._rows)
        else:
            h, is_open = self._modified_by_rows(input, out, mask, inside, self._rows)
        mask = _counted(mask, inside)
        seen, at = h, is_open
        if self._sequence_first and h.dim() == 3:
            seen, at = h.transpose(0, 1), None if is_open is None else is_open.T
            norms = norms and (reshaped(norms[0], Tensor.t), reshaped(norms[1], Tensor.t))
        for observer in self._observers:
            observer.tell(at, seen, mask, norms)
        if self.training and self._rows is None and self.gate is not None and at is not None:
            self.gate.count(at, mask)
        return h

    def _before(self, input: Tensor) -> tuple[Tensor, Factors | None]:
        """The input for the base layer, and M(x) in factors if that can be begun before it."""
        if not self._keeps_nothing() or "_hf_hook" in self.modification.__dict__:
            return input, None
        return self.modification.factors_before(input, cast(nn.Linear, self))

    def _keeps_nothing(self) -> bool:
        """Whether its output, and the gradient that it gives its input, may be written over."""
        # Others than PyTorch's own layers may keep theirs for backward.
        return self._own_class is nn.Linear and self._rows is None

    def _modified(
        self,
        input: Tensor,
        out: Tensor,
        mask: Tensor | None,
        inside: Tensor | None,
        modification: Modification,
        gate: Gate | None,
        factors: Factors | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Norms, Norms] | None]:
        """h, `(..., out_features)`; S, `(...)`, or None without a gate; the norms of m and w."""
        if "_hf_hook" in modification.__dict__:
            check_resident(modification)
        w = without_bias(out, self.bias) if modification.reads_w else out
        at_positions = None
        if (counted := _counted(mask, inside)) is not None:
            at_positions = self._in_own_order(counted, out)
        if factors is None:
            factors = modification.factors(input, w, cast(LinearLike, self))
        m = _whole(modification, input, w) if factors is None else factors
        change = Change(out, self.bias, m, self._keeps_nothing() and inside is None)
        norms = None
        if any(observer.norms for observer in self._observers):
            norms = change.norms()
        a = None if gate is None else gate(Positions(change, input, at_positions))
        if inside is not None:
            inside = self._in_own_order(inside, out)
            if inside.dtype != torch.bool:  # weights
                a = inside.to(change.dtype) * (1.0 if a is None else a)
        h = change.add(a)
        is_open = a if a is None or a.dtype == torch.bool else a.detach() != 0
        if inside is not None:
            # A selection: outside it is the base, whatever M(x) and its gate are there.
            h = torch.where(inside.unsqueeze(-1) != 0, h, out)
            is_open = (inside != 0) if is_open is None else is_open & (inside != 0)
        return h, is_open, norms

    def _modified_by_rows(
        self,
        input: Tensor,
        out: Tensor,
        mask: Tensor | None,
        inside: Tensor | None,
        rows: Rows,
    ) -> tuple[Tensor, Tensor]:
        """The same, of each row's own adapter; S is False in the rows of none."""
        dim = 1 if self._sequence_first and input.dim() == 3 else 0
        is_open = torch.zeros(out.shape[:-1], dtype=torch.bool, device=out.device)
        h = out
        for name, at in rows.of(input, dim, None if self._sequence_first else mask):
            adapter: Any = (self._adapters or {}).get(name)
            if adapter is None:
                continue
            own_mask = mask
            if mask is not None:  # (B, T), also where the input is flattened
                own_mask = mask.reshape(-1, 1)[at] if input.dim() == 2 else mask[at]
            own_inside = None if inside is None else inside[at]
            part, opened, _ = self._modified(
                input.index_select(dim, at),
                out.index_select(dim, at),
                own_mask,
                own_inside,
                adapter.modification,
                adapter.gate,
            )
            h = h.index_copy(dim, at, part)
            if opened is None:
                opened = torch.ones(part.shape[:-1], dtype=torch.bool, device=out.device)
            is_open = is_open.index_copy(dim, at, opened)
        return h, is_open

    def _modified_by_region(
        self,
        input: Tensor,
        out: Tensor,
        mask: Tensor | None,
        inside: Tensor | None,
        parts: Sequence[Tensor | None],
        regional: Regional,
    ) -> tuple[Tensor, Tensor]:
        """The same, of each region's own adapter; all are compared with the base's output."""
        is_open = torch.zeros(out.shape[:-1], dtype=torch.bool, device=out.device)
        h, w = out, without_bias(out, self.bias)
        for name, part in zip(regional.regions, parts, strict=True):
            adapter: Any = (self._adapters or {}).get(name)
            if adapter is None or part is None:
                continue
            if inside is not None:
                part = part * inside  # of truths, both
            factors = adapter.modification.factors(input, w, cast(LinearLike, self))
            m = _whole(adapter.modification, input, w) if factors is None else factors.product(w)
            counted = self._in_own_order(cast(Tensor, _counted(mask, part)), out)
            change = Change(out, self.bias, m if factors is None else factors)
            weights = self._in_own_order(part, out).to(change.dtype)
            if adapter.gate is not None:
                a = adapter.gate(Positions(change, input, counted))
                weights = torch.where(weights != 0, weights * a, 0)
            h = Change(h, self.bias, m).add(weights)
            is_open = is_open | (weights.detach() != 0)
        return h, is_open

    def _told_of(self, input: Tensor) -> tuple[Tensor | None, ...]:
        """The padding mask of the positions of `input`, `(B, T)`, and what restrictions allow.

        Of `(B, T, k)`, flattened `(B T, k)`, or in a sequence-first layer `(T, B, k)`; the second
        has the shape of its positions, samples first, and so has what follows: each adapter's
        region, where there are several.
        """
        mask, inside = self._mask, None
        elsewhere = self._others is not None and input is self._others[0]
        if elsewhere and self._others is not None:
            mask = self._others[1]
        parts: Sequence[Tensor | None] = ()
        told = bool(ACTIVE.get()) or isinstance(self._rows, Regional)
        if told and not (not torch.compiler.is_compiling() and in_backward()):
            first = input.transpose(0, 1) if self._sequence_first and input.dim() == 3 else input
            inside = allowed(self, first.shape[:-1], input, elsewhere)
            if isinstance(self._rows, Regional):
                parts = self._rows.of(self, first.shape[:-1], input, elsewhere)
        # In evaluation, too, it may be computed again; a mask alone does not change what comes out.
        told = told or self.training
        mask, inside, *parts = self._memory.settle(told, input, mask, inside, *parts)
        return self._fitting(mask, input), inside, *parts

    def _in_own_order(self, mask: Tensor, out: Tensor) -> Tensor:
        """`(...)`, as the positions of `out` are, from samples first."""
        swapped = self._sequence_first and mask.dim() == 2
        return (mask.T if swapped else mask).reshape(out.shape[:-1])

    def _fitting(self, mask: Tensor | None, input: Tensor) -> Tensor | None:
        if mask is None:
            return None
        mask = mask.to(input.device)  # of a model over several devices
        if self._sequence_first:
            return mask if input.shape[:-1] == mask.T.shape else None
        flattened = input.dim() == 2 and len(input) == mask.numel()
        return mask if flattened or input.shape[:-1] == mask.shape else None

    def _kept_by_copies(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _TRANSIENT} | _FRESH


def _counted(mask: Tensor | None, inside: Tensor | None) -> Tensor | None:
    """Which positions count, `(B, T)`: those that are real and inside; None for all."""
    if inside is None:
        return mask
    if mask is None:
        kept = inside != 0
        return kept.flatten(1) if kept.dim() > 1 else kept.reshape(-1, 1)
    return (mask != 0) & (inside != 0).reshape(mask.shape)


class GatedLinear(Gated, nn.Linear):
    """What an `nn.Linear` becomes; other kinds of linear layers become a class made for them."""

    _own_class = nn.Linear


def _whole(modification: Modification, x: Tensor, w: Tensor) -> Tensor:
    m: Tensor = modification(x, w)
    # Addition would broadcast what is too small, to all positions alike.
    if m.shape != w.shape:
        raise TokenGateError(
            f"{type(modification).__name__} gave a modification of shape {tuple(m.shape)} for an "
            f"output of shape {tuple(w.shape)}: return M(x) in the shape of w."
        )
    return m


@contextlib.contextmanager
def observing(observers: Mapping[Gated, Observer]) -> Iterator[None]:
    """Within this context each of these layers also tells its own observer of every call."""
    try:
        for layer, observer in observers.items():
            layer._observers = (*layer._observers, observer)
        yield
    finally:
        for layer, observer in observers.items():
            # From the instance: the layer may have been unpatched in the meantime.
            left = tuple(o for o in layer.__dict__.pop("_observers", ()) if o is not observer)
            if left:
                layer._observers = left


def attach(layer: LinearLike, modification: Modification, gate: Gate | None) -> None:
    """Turn `layer` itself into a gated one."""
    swap(layer, GatedLinear if isinstance(layer, nn.Linear) else Gated)
    layer.register_module("modification", modification.train(layer.training))
    layer.register_module("gate", None if gate is None else gate.train(layer.training))
    layer.__dict__ |= {**_FRESH, "_memory": MaskMemory()}


def detach(layer: Gated) -> None:
    """Turn `layer` back into what it was."""
    for name in ("modification", "gate", "adapters"):
        layer._modules.pop(name, None)
    for name in (*_TRANSIENT, *_FRESH, *_LASTING):
        layer.__dict__.pop(name, None)
    swap_back(layer)
