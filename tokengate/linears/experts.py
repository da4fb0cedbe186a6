"""A mixture's experts: which layers are theirs, and those held together in 3-D parameters."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from tokengate.names import named_modules


def is_expert(name: str) -> bool:
    """Whether a layer is an expert's, which sees the positions that a router sends there."""
    return any(part in ("expert", "experts") for part in name.split("."))


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
