"""From `gate=` to the gate of each layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from tokengate.arguments import unused
from tokengate.errors import TokenGateError, brief
from tokengate.gates.base import Gate
from tokengate.gates.fisher import FisherGate
from tokengate.gates.registry import GATES, check_options, options_of
from tokengate.methods.base import Modification
from tokengate.patching.options import options_by_layer


def gates_by_layer(
    gate: Any,
    options: Mapping[str, Any] | None,
    own: Mapping[str, Any],
    names: Collection[str],
) -> dict[str, tuple[type[Gate], dict[str, Any]] | None]:
    """The kind of gate of each layer of `names` and its options; None for no gate.

    Args:
        gate: as in `patch`.
        options: its `gate_options`.
        own: options that `patch` has by themselves, tau and penalty; None where not given. They
            are for the gates that have them, of which there must be one.
        names: of the layers.

    Raises:
        TokenGateError: no gate is called so; an option is unknown to one, given twice, or of none;
            a pattern is wrong.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TokenGateError(
            f"gate_options={brief(options)} is no dict: pass one, e.g. {{'sparsity': 0.5}}."
        )
    options = options or {}
    asked = options_by_layer({"gate": gate}, names)
    kinds = {name: kind for name in names if (kind := _kind(asked[name]["gate"])) is not None}
    if not kinds:
        unused("patch", "with gate=False", gate_options=options or None)
    twice = {name: value for name, value in own.items() if name in options}
    unused("patch", f"beside gate_options={brief(options)}", **twice)
    given = options_by_layer(options, kinds, "gated")
    extra = {name: value for name, value in own.items() if value is not None}
    used: set[str] = set()
    found: dict[str, tuple[type[Gate], dict[str, Any]] | None] = dict.fromkeys(names)
    for name, kind in kinds.items():
        check_options(kind, given[name])
        known = options_of(kind)
        used |= extra.keys() & known.keys()
        found[name] = kind, {**{k: v for k, v in extra.items() if k in known}, **given[name]}
    for name in extra.keys() - used if kinds else ():
        of = ", ".join(sorted({kind.__name__ for kind in kinds.values()}))
        raise TokenGateError(
            f"{name}={brief(extra[name])} was given, which no gate has: drop it, or ask for "
            f"another than {of}."
        )
    return found


def build_gate(
    planned: tuple[type[Gate], dict[str, Any]] | None, linear: nn.Linear, beside: Modification
) -> Gate | None:
    """The planned gate of a layer that has this modification, or None.

    Raises:
        TokenGateError: an option is wrong, or a rank that was given is not the method's.
    """
    if planned is None:
        return None
    kind, options = planned
    rank, given = beside.factor_rank, options.get("rank")
    known = rank is not None or not beside.has_factors
    if issubclass(kind, FisherGate) and given is not None and known and given != rank:
        raise TokenGateError(
            f"rank={brief(given)} was given to a {kind.__name__}, and {type(beside).__name__} has "
            f"{'no factors' if rank is None else f'one of {rank}'}: leave rank out of gate_options."
        )
    if rank is not None and "rank" in options_of(kind):
        options = {"rank": rank, **options}
    return kind.beside(linear, **options)


def _kind(gate: Any) -> type[Gate] | None:
    if gate is False:
        return None
    if gate is None:
        raise TokenGateError(
            "unknown gate None: pass gate=False for the plain method, or leave it out for the "
            "paper's threshold."
        )
    return GATES.find("threshold" if gate is True else gate)
