"""What a module of experts reads in place of a stacked parameter: products with it are changed.

Its own code runs as it is, whichever way it multiplies: expert by expert, all at once, or with a
copy for each row. What it multiplies by knows which rows are whose, and gives W0 x + a M(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tokengate.errors import TokenGateError


@dataclass(frozen=True)
class Whose:
    """Of which expert each row of a product is; one of these is not None.

    Attributes:
        expert: of this one are all of them.
        ids: of each row, `(N,)`.
        ends: where those of each expert end, `(E,)`, which follow one another.
        rows: of each expert so many, one expert after the other.
    """

    expert: Any = None
    ids: Tensor | None = None
    ends: Tensor | None = None
    rows: int | None = None


# From the rows of a product, (N, in_features), the product, (N, out_features), and what was added
# to it, (out_features,) or None, to the changed product.
Change = Callable[[Tensor, Tensor, Tensor | None, Whose], Tensor]

_ASKED = ("shape", "ndim", "layout", "is_cuda", "is_meta", "is_sparse", "requires_grad")
_CALLED = ("dim", "size", "stride", "numel", "data_ptr", "element_size", "is_contiguous")
_CAST = ("to", "float", "double", "half", "bfloat16", "contiguous")
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback", None)
_MATMUL = ("matmul", "__matmul__", "mm", "bmm", None)


class Held:
    """A stacked parameter, or a part of it, that stands in for a tensor in a product.

    Args:
        tensor: it.
        axes: what its dimensions are: e, o and i, or r in place of e where each row has its own.
        name: of the parameter.
        change: what becomes of a product.
        expert: the one that this is of; None for all.
        ids: of each row, where rows have their own.
    """

    def __init__(
        self,
        tensor: Tensor,
        axes: str,
        name: str,
        change: Change,
        expert: Any = None,
        ids: Tensor | None = None,
    ) -> None:
        self.tensor, self.axes, self.name, self.change = tensor, axes, name, change
        self.expert, self.ids = expert, ids

    def _like(self, tensor: Tensor, axes: str, expert: Any = None, ids: Any = None) -> Held:
        expert = self.expert if expert is None else expert
        ids = self.ids if ids is None else ids
        return Held(tensor, axes, self.name, self.change, expert, ids)

    def __getitem__(self, index: Any) -> Held:
        part = self.tensor[index]
        if self.axes[0] == "e":
            if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
                return self._like(part, self.axes[1:], expert=index)
            if isinstance(index, Tensor) and index.dim() == 1 and not index.is_floating_point():
                return self._like(part, "r" + self.axes[1:], ids=index)
        raise self.unknown("an index that picks no experts")

    def transpose(self, first: int, second: int) -> Held:
        """As a tensor's."""
        axes = list(self.axes)
        axes[first], axes[second] = axes[second], axes[first]
        return self._like(self.tensor.transpose(first, second), "".join(axes))

    def t(self) -> Held:
        """As a tensor's."""
        return self.transpose(-2, -1)

    @property
    def mT(self) -> Held:
        """As a tensor's."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Held:
        """As a tensor's, of two dimensions."""
        return self.transpose(-2, -1)

    @property
    def dtype(self) -> torch.dtype:
        """As a tensor's."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """As a tensor's."""
        return self.tensor.device

    def __len__(self) -> int:
        return len(self.tensor)

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED or name in _CALLED:
            return getattr(self.tensor, name)
        if name in _CAST:
            return lambda *args, **kwargs: self._like(
                getattr(self.tensor, name)(*args, **kwargs), self.axes
            )
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.unknown(f"{name!r}")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Tensor:
        kwargs = kwargs or {}
        held = _held_among((*args, *kwargs.values()))
        # A compiler knows no names of functions; what the axes allow is what they can be.
        name = None if torch.compiler.is_compiling() else _name_of(func)
        if held.axes == "oi" and name in ("linear", None):
            return _linear(held, *args, **kwargs)
        ends = len(args) > 2 or (len(args) == 2 and "offs" in kwargs)
        if held.axes == "eio" and ends and name in _GROUPED:
            return _grouped(held, func, args, kwargs)
        if name in _MATMUL and len(args) == 2 and not kwargs:
            return _matmul(held, func, *args)
        raise held.unknown(repr(name or func))

    def _changed(self, x: Tensor, out: Tensor, bias: Tensor | None, whose: Whose) -> Tensor:
        rows = self.change(x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1]), bias, whose)
        return rows.view(out.shape)

    def unknown(self, what: str) -> TokenGateError:
        """The error of a use that cannot be changed."""
        return TokenGateError(
            f"the experts' code uses {self.name!r} in {what} with axes {self.axes!r}, which is no "
            "product of rows with an expert's matrix that is known here: choose another "
            'implementation (model.set_experts_implementation("grouped_mm")), correct experts=, '
            "or leave these experts out."
        )


def _held_among(given: Iterable[Any]) -> Held:
    """What torch found in a call: an argument, or one in a list, as of `torch.stack`."""
    for each in given:
        for part in each if isinstance(each, (list, tuple)) else (each,):
            if isinstance(part, Held):
                return part
    raise AssertionError(given)


def _name_of(func: Any) -> str:
    name = getattr(func, "_qualified_op_name", getattr(func, "__name__", repr(func)))
    return str(name).rpartition("::")[2]


def _linear(held: Held, input: Tensor, weight: object, bias: Tensor | None = None) -> Tensor:
    if held.axes != "oi" or held is not weight:
        raise held.unknown("'linear'")
    out = torch.nn.functional.linear(input, held.tensor, bias)
    return held._changed(input, out, bias, Whose(expert=held.expert))


def _grouped(held: Held, func: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight = args[0], cast(object, args[1])
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    if held.axes != "eio" or held is not weight or ends is None:
        raise held.unknown("'grouped_mm'")
    out: Tensor = func(x, held.tensor, *args[2:], **kwargs)
    return held._changed(x, out, None, Whose(ends=ends))


def _matmul(held: Held, func: Any, left: Any, right: Any) -> Tensor:
    is_right = isinstance(right, Held)
    out: Tensor = func(left, held.tensor) if is_right else func(held.tensor, right)
    if is_right:
        if held.axes == "io":
            return held._changed(left, out, None, Whose(expert=held.expert))
        if held.axes == "rio" and left.dim() == 3:
            return held._changed(left, out, None, Whose(ids=_each(held, left.shape[1])))
        if held.axes == "eio" and left.dim() == 3 and len(left) == len(held):
            return held._changed(left, out, None, Whose(rows=left.shape[1]))
    elif held.axes == "roi" and right.dim() == 3:
        ids = _each(held, right.shape[2])
        return held._changed(right.mT, out.mT, None, Whose(ids=ids)).mT
    raise held.unknown("a matrix product")


def _each(held: Held, count: int) -> Tensor:
    assert held.ids is not None
    return held.ids if count == 1 else held.ids.repeat_interleave(count)
