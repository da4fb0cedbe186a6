"""What a target matches beside linear layers and is not patched, where one could think it is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set

from torch import nn

from tokengate.errors import SkippedModuleWarning, listed
from tokengate.gates.base import Gate
from tokengate.layers.gated_linear import Gated
from tokengate.linears.linear_like import LinearSlice, is_linear
from tokengate.methods.base import Modification


def skipped(matched: Set[nn.Module], by_name: bool) -> set[nn.Module]:
    """Those of `matched` that somebody may expect to be patched, and that are no linear layers.

    Modules that have a matrix of their own, as convolutions and embeddings; a pattern over names
    (a glob, a regular expression, a callable) also matches containers, norms and activations, by
    which nobody means these. Whoever writes a name means all that is called so and has parameters,
    but for a container of layers that are matched themselves.

    Args:
        matched: by one target, without what is excluded.
        by_name: whether the target is a name.
    """
    inside = {part for each in matched if isinstance(each, Gated) for part in each.modules()}
    others = {m for m in matched if not _can_be_patched(m)} - inside
    others = {m for m in others if not isinstance(m, (Modification, Gate))}
    matrices = {m for m in others if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    if not by_name:
        return matrices
    return matrices | {
        m
        for m in others
        if any(True for _ in m.parameters())
        and not any(_can_be_patched(part) and part in matched for part in m.modules())
    }


def warn_of_skipped(found: Mapping[str, Set[nn.Module]], names: Mapping[nn.Module, str]) -> None:
    """A `SkippedModuleWarning` of what each target, as it is shown, has skipped.

    Args:
        found: by target.
        names: of all modules.
    """
    for target, modules in found.items():
        if not modules:
            continue
        own = sorted((names[m], type(m).__name__) for m in modules)
        shown = listed(f"{name!r} ({kind})" for name, kind in own)
        warnings.warn(
            f"target {target} matches linear layers, which are patched, and {shown}, which "
            "cannot be and stay as they are: name the layers more exactly, or leave these out with "
            "exclude=.",
            SkippedModuleWarning,
            stacklevel=5,
        )


def _can_be_patched(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, LinearSlice)
