"""From `train=` to the parameters that stay trainable beside what is patched."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokengate.errors import TokenGateError
from tokengate.linears.accelerate_hooks import offloaded_parameters
from tokengate.names import named_parameters
from tokengate.patching.heads import head
from tokengate.patterns import as_patterns, matches, nearest, show

# Of `train`: a model's head, whatever it is called there.
_HEAD = "head"


def named_by_train(model: nn.Module, train: Any) -> dict[str, nn.Parameter]:
    """The parameters that `train` of `patch` names, by name; "head" also means what `head` finds.

    Raises:
        TokenGateError: a pattern matches nothing, or what cannot be trained.
    """
    # Under all names: a tied weight has several.
    parameters = dict(named_parameters(model, remove_duplicate=False))
    named: dict[str, nn.Parameter] = {}
    for pattern in as_patterns("train", () if train is None else train):
        hits = {
            name: parameter
            for name, parameter in parameters.items()
            if any(matches(pattern, prefix) for prefix in _prefixes(name))
        }
        if pattern == _HEAD:
            hits |= head(model)
        if not hits:
            where = ", by name or by place" if pattern == _HEAD else ""
            raise TokenGateError(
                f"train {show(pattern)} matches no parameter of this {type(model).__name__}"
                f"{where}; {nearest(pattern, (p for n in parameters for p in _prefixes(n)))}."
            )
        named |= hits
    offloaded = offloaded_parameters(model)
    for name, parameter in named.items():
        if id(parameter) in offloaded:
            raise TokenGateError(
                f"train names {name!r}, which is offloaded and replaced in every forward, so that "
                "it could not be trained: keep it on a device, or drop it."
            )
        if not parameter.is_floating_point():
            raise TokenGateError(
                f"train names {name!r}, whose dtype {parameter.dtype} cannot be trained: drop it."
            )
    return named


def _prefixes(name: str) -> list[str]:
    """A parameter's name and those of the modules that hold it: a, a.b, a.b.weight."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
