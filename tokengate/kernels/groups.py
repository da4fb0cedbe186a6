"""Rows of several layers at once, sorted by layer, as tokens are that a router sends to experts.

Each layer multiplies its own rows: `(N, a)` by stacked matrices `(E, a, b)`. Nothing is made of the
size of a matrix but the gradients of the stack, and a layer without rows costs nothing.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokengate.kernels.eager import is_eager
from tokengate.kernels.precision import in_own_dtypes

# The dtypes that `grouped_mm` takes without a loop that waits for the device.
_KERNELS = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16,),
}


class Groups:
    """Which of N rows are whose.

    Args:
        ends: where the rows of each layer end, `(E,)`; they begin where those of the last one do.
        rows: N.
        rest: whether there may be rows behind the last end, which are nobody's: 0 is made of them.
    """

    def __init__(self, ends: Tensor, rows: int, rest: bool = False) -> None:
        self.ends, self.rest = ends.to(torch.int32), rest
        places = torch.arange(rows, device=ends.device, dtype=torch.int32)
        #: The layer of each row, `(N,)`; E of those that are nobody's.
        self.of_row = torch.searchsorted(self.ends, places, right=True)
        self._slices: list[tuple[int, slice]] | None = None

    def slices(self) -> list[tuple[int, slice]]:
        """The layers that have rows, and which; waits for the device."""
        if self._slices is None:
            ends = self.ends.tolist()
            pairs = zip(range(len(ends)), [0, *ends[:-1]], ends, strict=True)
            self._slices = [(e, slice(start, end)) for e, start, end in pairs if start < end]
        return self._slices

    def spread(self, values: Tensor) -> Tensor:
        """To each row its layer's: `(E, ...) -> (N, ...)`."""
        if self.rest:
            values = torch.cat([values, torch.zeros_like(values[:1])])
        return values[self.of_row]

    def sums(self, values: Tensor) -> Tensor:
        """Over the rows of each layer: `(N, ...) -> (E, ...)`."""
        count = len(self.ends)
        zeros = values.new_zeros((count + self.rest, *values.shape[1:]))
        return zeros.index_add(0, self.of_row, values)[:count]


def grouped_product(rows: Tensor, stack: Tensor, groups: Groups) -> Tensor:
    """Each row times its layer's matrix: `(N, a), (E, a, b) -> (N, b)`."""
    product: Tensor = _Product.apply(rows, stack, groups)
    return product


def grouped_outer(left: Tensor, right: Tensor, groups: Groups) -> Tensor:
    """Of each layer the sum of its rows' outer products: `(N, a), (N, b) -> (E, a, b)`."""
    outer: Tensor = _Outer.apply(left, right, groups)
    return outer


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(rows, stack)
        ctx.groups = groups
        if torch.compiler.is_compiling():
            product: Tensor = _product_op(rows, stack, groups.ends, groups.rest)
            return product
        return _product(rows, stack, groups)

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, stack = ctx.saved_tensors
        grad_rows = grad_stack = None
        if ctx.needs_input_grad[0]:
            grad_rows = grouped_product(grad, stack.mT, ctx.groups)
        if ctx.needs_input_grad[1]:
            grad_stack = grouped_outer(rows, grad, ctx.groups)
        return grad_rows, grad_stack, None


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.groups = groups
        if torch.compiler.is_compiling():
            outer: Tensor = _outer_op(left, right, groups.ends)
            return outer
        return _outer(left, right, groups)

    @staticmethod
    @in_own_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            grad_left = grouped_product(right, grad.mT, ctx.groups)
        if ctx.needs_input_grad[1]:
            grad_right = grouped_product(left, grad, ctx.groups)
        return grad_left, grad_right, None


def _product(rows: Tensor, stack: Tensor, groups: Groups) -> Tensor:
    if _in_one(rows, stack):
        product: Tensor = F.grouped_mm(rows, stack, offs=groups.ends)
        if groups.rest:  # which it leaves as the memory was
            product.masked_fill_((groups.of_row == len(groups.ends)).unsqueeze(-1), 0)
        return product
    product = rows.new_zeros((len(rows), stack.shape[2]))
    for layer, own in groups.slices():
        torch.mm(rows[own], stack[layer], out=product[own])
    return product


def _outer(left: Tensor, right: Tensor, groups: Groups) -> Tensor:
    if _in_one(left.T, right):
        outer: Tensor = F.grouped_mm(left.T, right, offs=groups.ends)
        return outer
    outer = left.new_zeros((len(groups.ends), left.shape[1], right.shape[1]))
    for layer, own in groups.slices():
        torch.mm(left[own].T, right[own], out=outer[layer])
    return outer


def _in_one(*factors: Tensor) -> bool:
    """Whether torch's own kernel for it takes these."""
    device = factors[0].device
    if not is_eager(*factors) or device.type not in _KERNELS:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return all(t.dtype in _KERNELS[device.type] and _is_aligned(t) for t in factors)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether one of the last two dimensions is contiguous and the other in steps of 16 bytes."""
    *outer, wide, narrow = tensor.stride()
    steps = [*outer, wide if narrow == 1 else narrow]
    contiguous = narrow == 1 or wide == 1
    size = tensor.element_size()
    whole = all(step * size % 16 == 0 for step in itertools.chain(steps, [tensor.data_ptr()]))
    return contiguous and whole


# What a compiler is to see as one operation: how many rows a layer has is known when it runs.
@torch.library.custom_op("tokengate::grouped_product", mutates_args=())
def _product_op(rows: Tensor, stack: Tensor, ends: Tensor, rest: bool) -> Tensor:
    return _product(rows, stack, Groups(ends, len(rows), rest))


@_product_op.register_fake
def _(rows: Tensor, stack: Tensor, ends: Tensor, rest: bool) -> Tensor:
    return rows.new_empty((rows.shape[0], stack.shape[2]))


@torch.library.custom_op("tokengate::grouped_outer", mutates_args=())
def _outer_op(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return _outer(left, right, Groups(ends, len(left)))


@_outer_op.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty((ends.shape[0], left.shape[1], right.shape[1]))
