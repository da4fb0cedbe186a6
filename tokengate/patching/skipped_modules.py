"""What a target matches that is no layer that can be patched: what is done or said of it.

A small module around one layer, as Gemma 4's clippable linear, stands for that layer, which is
patched in its place, so that what the module does around it stays. Of the rest a warning tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set

from torch import nn

from tokengate.errors import SkippedModuleWarning, listed
from tokengate.gates.base import Gate
from tokengate.layers.gated_linear import Gated
from tokengate.linears.experts import StackedLinear
from tokengate.linears.linear_like import LinearSlice, is_linear_like
from tokengate.methods.base import Modification
from tokengate.names import named_modules

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def is_target(module: nn.Module) -> bool:
    """Whether it is a linear layer, a convolution, a slice of a fused layer, or experts'."""
    return is_linear_like(module) or isinstance(module, (LinearSlice, StackedLinear))


def only_layer(module: nn.Module) -> nn.Module | None:
    """The layer that is all of a module's parameters, if the module has a forward around it."""
    if is_target(module) or type(module).forward is nn.Module.forward:
        return None
    layer = next((m for _, m in named_modules(module) if is_linear_like(m)), None)
    if layer is None:
        return None
    own = {id(parameter) for parameter in layer.parameters()}
    return layer if all(id(parameter) in own for parameter in module.parameters()) else None


def why_not(module: nn.Module, stacks: Sequence[str] = ()) -> str:
    """Why a module that is no layer cannot be patched, and what to do, as the end of a sentence.

    Args:
        module: the module.
        stacks: the names of its experts' projections.
    """
    kind = type(module).__name__
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return (
            f"which is an nn.{kind}, whose rows are looked up and multiplied with nothing, so that "
            "there is no position to gate: train it whole with train=, or drop it"
        )
    if isinstance(module, _CONVOLUTIONS):
        return (
            f"which is an nn.{kind}, and of convolutions nn.Conv2d alone can be patched: train it "
            "whole with train=, or drop it"
        )
    layers = [name for name, m in named_modules(module) if is_linear_like(m)]
    inside = next(iter([*layers, *stacks]), None)
    remedy = f"name those inside it, e.g. {inside!r}" if inside else "drop it"
    return f"which is a {kind}, not a linear layer: {remedy}"


def skipped(matched: Set[nn.Module], by_name: bool) -> set[nn.Module]:
    """Those of `matched` that somebody may expect to be patched, and that are no linear layers.

    Modules that have a matrix of their own, as embeddings; a pattern over names (a glob, a regular
    expression, a callable) also matches containers, norms and activations, by which nobody means
    these. Whoever writes a name means all that is called so and has parameters, but for a container
    of layers that are matched themselves.

    Args:
        matched: by one target, without what is excluded or stands for a layer.
        by_name: whether the target is a name.
    """
    inside = {part for each in matched if isinstance(each, Gated) for part in each.modules()}
    others = {m for m in matched if not is_target(m)} - inside
    others = {m for m in others if not isinstance(m, (Modification, Gate))}
    matrices = {m for m in others if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    if not by_name:
        return matrices
    return matrices | {
        m
        for m in others
        if any(True for _ in m.parameters())
        and not any(is_target(part) and part in matched for part in m.modules())
    }


def warn_of_skipped(
    entered: Mapping[nn.Module, nn.Module],
    left: Mapping[str, Set[nn.Module]],
    names: Mapping[nn.Module, str],
) -> None:
    """One `SkippedModuleWarning` of all that the targets match and that is no linear layer.

    Args:
        entered: modules, and the layers inside that are patched in their place.
        left: by target, as it is shown: modules that stay as they are.
        names: of all modules.
    """
    said = []
    if entered:
        shown = listed(sorted(f"{names[m]!r} ({type(m).__name__})" for m in entered))
        layer = min(names[layer] for layer in entered.values())
        said.append(
            f"{shown}, each around one linear layer, which is patched in its place, e.g. {layer!r}"
        )
    found = {target: modules for target, modules in left.items() if modules}
    if found:
        modules = {m for each in found.values() for m in each}
        shown = listed(sorted(f"{names[m]!r} ({type(m).__name__})" for m in modules))
        said.append(
            f"{shown}, which cannot be patched and stay as they are: name the layers more exactly, "
            "leave these out with exclude=, or train them whole with train="
        )
    if said:
        which = f"target {', '.join(found)} matches" if found else "targets match"
        warnings.warn(
            f"{which} beside linear layers {'; and '.join(said)}.",
            SkippedModuleWarning,
            stacklevel=5,
        )
