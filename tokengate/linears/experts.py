"""A mixture's experts: which layers are theirs, and those held together in 3-D parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.linears.slices import Slices
from tokengate.names import named_modules

# The axes of a stacked parameter: expert, output, input.
AXES = ("eoi", "eio")


def is_expert(name: str) -> bool:
    """Whether a layer is an expert's, which sees the positions that a router sends there."""
    return any(part in ("expert", "experts") for part in name.split("."))


@dataclass(frozen=True)
class Stack:
    """How a module holds one projection of all of its experts in a 3-D parameter.

    Attributes:
        axes: "eoi" for `(experts, out_features, in_features)`, or "eio".
        slices: how its outputs are divided, where they are of several projections.
    """

    axes: str
    slices: Slices | None = None


def known_stacks(module: nn.Module) -> dict[str, Stack]:
    """The stacks of a module by the names of their parameters; empty where they are not known.

    transformers' experts say themselves whether they are transposed, and whether gate and up are
    interleaved; of others that use its names the shapes tell.
    """
    own: dict[str, Any] = module.__dict__
    down = module._parameters.get("down_proj")
    first = next((n for n in ("gate_up_proj", "up_proj") if n in module._parameters), None)
    up = None if first is None else module._parameters[first]
    if first is None or up is None or down is None or not up.dim() == down.dim() == 3:
        return {}
    transposed = own.get("is_transposed")
    if transposed is None:
        parts = 2 if first == "gate_up_proj" else 1
        fits = [_fits(up, down, parts), _fits(up.mT, down.mT, parts)]
        if sum(fits) != 1:
            return {}
        transposed = fits[1]
    axes = AXES[int(transposed)]
    slices = None
    if first == "gate_up_proj":
        half = up.shape[axes.index("o")] // 2
        slices = Slices(gate=half, up=half)
        if not own.get("is_concatenated", True):
            slices = Slices(groups=half, gate=1, up=1)
    return {first: Stack(axes, slices), "down_proj": Stack(axes)}


def _fits(up: Tensor, down: Tensor, parts: int) -> bool:
    """Whether these are `(E, parts f, k)` and `(E, k, f)`."""
    return up.shape[2] == down.shape[1] and up.shape[1] == parts * down.shape[2]


class StackedLinear(nn.Module):
    """One projection of experts, `(N, in_features) -> (N, out_features)`, each row by its own.

    It has no parameters of its own: `weight` is in a parameter of the module that holds them.

    Args:
        owner: that module.
        parameter: the name of its parameter.
        stack: how that is laid out.
        part: the one of its slices that this is; None for all outputs.
        fused: of a part, the projection with all outputs.
        experts: which of those there this is of, in their order; None for all.
    """

    owner: nn.Module
    fused: StackedLinear | None
    experts: tuple[int, ...]
    # What is added before the bias needs none of it.
    bias = None

    def __init__(
        self,
        owner: nn.Module,
        parameter: str,
        stack: Stack,
        part: str | None = None,
        fused: StackedLinear | None = None,
        experts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        # Past nn.Module, which would make the owner a child of its own child.
        object.__setattr__(self, "owner", owner)
        object.__setattr__(self, "fused", fused)
        self.parameter, self.stack, self.part = parameter, stack, part
        self.training = owner.training
        every, self.out_features, self.in_features = self._whole.shape
        self.experts = tuple(range(every) if experts is None else experts)

    @property
    def num_experts(self) -> int:
        """How many this is of."""
        return len(self.experts)

    @property
    def is_of_all(self) -> bool:
        """Whether the parameter holds no other experts."""
        return self.num_experts == len(self.held)

    def of(self, experts: Sequence[int] | None) -> StackedLinear:
        """The same projection of some of the experts, or of all."""
        return StackedLinear(self.owner, self.parameter, self.stack, self.part, self.fused, experts)

    def names_of_experts(self, name: str) -> list[str]:
        """Of this projection, `mlp.experts.up_proj`, that of each: `mlp.experts.3.up_proj`."""
        return [self.name_of_expert(name, expert) for expert in self.experts]

    def name_of_expert(self, name: str, expert: int) -> str:
        """That of one, by its number."""
        return f"{name.removesuffix(self.key)}{expert}.{self.key}"

    @property
    def key(self) -> str:
        """Its name in its owner."""
        return self.parameter if self.part is None else f"{self.parameter}.{self.part}"

    @property
    def weight(self) -> Tensor:
        """`(experts, out_features, in_features)`; a view, but of some experts, and of
        interleaved slices."""
        weight = self._whole
        return weight if self.is_of_all else weight[list(self.experts)]

    @property
    def _whole(self) -> Tensor:
        """Of all that the parameter holds."""
        whole = self.held
        weight = whole.mT if self.stack.axes == "eio" else whole
        if self.part is None:
            return weight
        assert self.stack.slices is not None
        return self.stack.slices.take(weight, self.part, 1)

    @property
    def held(self) -> Tensor:
        """The owner's parameter."""
        parameter = self.owner._parameters[self.parameter]
        assert parameter is not None
        return parameter

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Write `(experts, out_features, in_features)` over its own, in place."""
        held = self.held.data.mT if self.stack.axes == "eio" else self.held.data
        for expert, values in zip(self.experts, weight, strict=True):
            if self.part is None or self.stack.slices is None:
                held[expert].copy_(values)
            else:
                self.stack.slices.write(held[expert], self.part, values, 0)

    def each(self) -> list[Any]:
        """The linear layers of its experts, of which nothing is copied but interleaved slices."""
        weights = self._whole.unbind(0)
        return [ExpertLinear(weights[expert]) for expert in self.experts]

    def product(self, right: Tensor) -> Tensor:
        """W0_e `right_e` of each, `(experts, in_features, r) -> (experts, out_features, r)`."""
        if self.is_of_all:
            return self.weight @ right
        pairs = zip(self.each(), right, strict=True)
        return torch.stack([linear.weight @ own for linear, own in pairs])

    def take(self, out: Tensor) -> Tensor:
        """What of the owner's product, `(N, ...)`, is this projection's: `(N, out_features)`."""
        slices = self.stack.slices
        return out if self.part is None or slices is None else slices.take(out, self.part)

    def forward(self, input: Tensor, out: Tensor) -> Tensor:
        """`out`, which is this projection of `input` as the owner computed it."""
        return out

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts} of {len(self.held)} experts, in_features={self.in_features}, "
            f"out_features={self.out_features}"
        )


def some_experts(layer: nn.Module) -> list[int] | None:
    """The numbers of the experts that a layer is of, where there are others beside them."""
    if not isinstance(layer, StackedLinear) or layer.is_of_all:
        return None
    return list(layer.experts)


class ExpertLinear:
    """One expert's projection, as far as a method or a gate reads a layer.

    Attributes:
        weight: `(out_features, in_features)`.
    """

    bias = None

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.out_features, self.in_features = weight.shape


def unpatchable(owner: nn.Module, parameter: Tensor) -> str | None:
    """Why a stack cannot be patched, as the end of a sentence; None if it can."""
    if getattr(owner, "_is_expert_parallel", False) or hasattr(parameter, "full_tensor"):
        return (
            "whose experts are divided over processes (expert parallelism), where rows are sorted "
            "otherwise: load the model without, or exclude it"
        )
    if type(parameter) not in (Tensor, nn.Parameter) or not parameter.is_floating_point():
        return "whose experts are quantised: load the model without, or exclude it"
    return None


def stacked_expert(
    model: nn.Module, target: str, excluded: Collection[nn.Module] = ()
) -> tuple[str, str] | None:
    """The module and its 3-D parameter that `target` means as well, such as `"down_proj"`.

    `"gate_proj"` means `gate_up_proj` too: such a name would patch the dense layers and the shared
    experts, and silently leave out all others. Only a plain name is asked about; one with a dot or
    a `*` says where.
    """
    for name, module in named_modules(model):
        if "expert" not in name.rpartition(".")[2] or module in excluded:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            meant = target == own or (target.endswith("_proj") and _parts(target) <= _parts(own))
            if parameter.dim() == 3 and meant:
                return name, own
    return None


def _parts(name: str) -> set[str]:
    """gate_up_proj -> gate, up."""
    return set(name.removesuffix("_proj").split("_"))
