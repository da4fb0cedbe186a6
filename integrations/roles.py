"""From role names ("q", "v", "up") to the layers that hold them, by a table of name endings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from tokengate import TokenGateError
from tokengate.linears.fused import known_slices
from tokengate.linears.owners import reads_weight
from tokengate.names import named_modules, submodule

# The ending of a layer's dotted name -> the roles that the layer holds, separated by spaces;
# several where they are fused in one weight, none where the ending only looks like a role's.
Endings: TypeAlias = Mapping[str, str]


def holders(model: nn.Module, endings: Endings) -> dict[str, frozenset[str]]:
    """The layers of `model` that have a known ending, by full name, with the roles they hold.

    An ending matches whole components, each of which may be a glob; the longest one decides:
    `attention.output.dense` is no `output.dense`.
    """
    split = {tuple(ending.split(".")): roles for ending, roles in endings.items()}
    longest_first = sorted(split, key=len, reverse=True)
    found = {}
    for name, module in named_modules(model):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            continue
        parts = name.split(".")
        for ending in longest_first:
            last = parts[-len(ending) :]
            if len(last) == len(ending) and all(map(fnmatchcase, last, ending)):
                if split[ending]:
                    found[name] = frozenset(split[ending].split())
                break
    return found


def check_known(asked: Collection[str], known: Collection[str]) -> None:
    """Refuse a call without roles, or with a role that no model has."""
    if not asked:
        raise TokenGateError(f"no role was asked for: pass at least one of {', '.join(known)}.")
    for role in asked:
        if role not in known:
            raise TokenGateError(f"unknown role {role!r}: the roles are {', '.join(known)}.")


def choose(
    model: nn.Module,
    asked: Collection[str],
    held: Mapping[str, frozenset[str]],
    apart: bool = False,
) -> list[str]:
    """The names of the layers that hold the roles `asked` for, in the model's order.

    Of a fused layer, the slices that were asked for; or the whole layer, if all of them were and
    they are not to be `apart`.

    Raises:
        TokenGateError: a role is not there, is fused with one that was not asked for in a way that
            is not known, or is in a layer that is never called.
    """
    kind = type(model).__name__
    there = frozenset[str]().union(*held.values())
    for role in asked:
        if role not in there:
            has = f"the roles {', '.join(sorted(there))}" if there else "no layer with a known role"
            raise TokenGateError(
                f"no layer of this {kind} is known to hold the role {role!r}, it has {has}: ask "
                "for those, or give patch the names of layers."
            )
    chosen = []
    for name, roles in held.items():
        wanted, missing = roles & set(asked), roles - set(asked)
        if not wanted:
            continue
        path, _, child = name.rpartition(".")
        owner = submodule(model, path)
        if missing or (apart and len(roles) > 1):
            slices = known_slices(owner, child)
            if slices is None or not wanted <= slices.sizes.keys():
                asked_for = (
                    f"{_join(missing)} {'was' if len(missing) == 1 else 'were'} not asked for"
                    if missing
                    else "they were asked for apart"
                )
                raise TokenGateError(
                    f"{name!r} of this {kind} holds {_join(roles)} fused in one weight in a way "
                    f"that is not known here, and {asked_for}: ask for all of them together, leave "
                    "all of them out, or give patch slices= and names."
                )
            chosen += [f"{name}.{role}" for role in slices.sizes if role in wanted]
        else:
            chosen.append(name)
        if reads_weight(owner, child):
            raise TokenGateError(
                f"{name!r} of this {kind} is never called, because its owner reads the weight "
                f"itself, so that a patch would do nothing: leave out {_join(roles)}."
            )
    return chosen


def _join(roles: Collection[str]) -> str:
    *most, last = sorted(roles)
    return f"{', '.join(most)} and {last}" if most else last
