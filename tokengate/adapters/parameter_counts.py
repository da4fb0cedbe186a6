"""How many parameters a model has, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokengate.gates.base import Gate
from tokengate.linears.quantised import is_four_bit
from tokengate.methods.base import Modification
from tokengate.names import check_module


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of elements, each parameter once; print it for a line."""

    trainable: int
    """Of all parameters that require a gradient."""
    total: int
    """Of all parameters, those of quantised weights as many as they stand for."""
    modifications: int
    """Of the trainable ones, those of modifications, of all adapters."""
    gates: int
    """Of the trainable ones, those of gates: a tau is one."""

    @property
    def others(self) -> int:
        """The trainable ones that are neither, as of a head."""
        return self.trainable - self.modifications - self.gates

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        # What PEFT's print_trainable_parameters says, and what these parameters are.
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {share:.4f} || modifications: {self.modifications:,}, "
            f"gates: {self.gates:,}, others: {self.others:,}"
        )


def count(model: nn.Module) -> ParameterCounts:
    """What is trained of `model`, patched or not:

        print(tokengate.count(model))

    Raises:
        TokenGateError: `model` is no module.
    """
    check_module("count", model)
    sizes: dict[nn.Parameter, int] = {}
    modifications: set[nn.Parameter] = set()
    gates: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                packed = name == "weight" and is_four_bit(module)  # type: ignore[arg-type]
                sizes[parameter] = _unpacked(module) if packed else _size(parameter)
        if isinstance(module, Modification):
            modifications.update(module.parameters())
        elif isinstance(module, Gate):
            gates.update(module.parameters())
    trained = {parameter for parameter in sizes if parameter.requires_grad}

    def of(some: Iterable[nn.Parameter]) -> int:
        return sum(sizes[parameter] for parameter in some)

    return ParameterCounts(of(trained), of(sizes), of(trained & modifications), of(trained & gates))


def _size(parameter: nn.Parameter) -> int:
    whole: int = getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed's, when divided
    return whole


def _unpacked(layer: Any) -> int:
    size: int = layer.out_features * layer.in_features
    return size
