"""Positions that the user gives: where, within a context, the modifications may act at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import Tensor, nn

from tokengate.arguments import switch, unused
from tokengate.contexts import Waiting
from tokengate.errors import TokenGateError
from tokengate.layers.calls import RESTRICT, Context, enter, in_context, leave
from tokengate.layers.folded import folded
from tokengate.layers.patched import all_layers, may_be_idle
from tokengate.layers.regions import After, Region, valid_where
from tokengate.patterns import Pattern, as_patterns, matches, nearest, show

# What a restriction says: of each layer its name, and its region.
Said: TypeAlias = Mapping[nn.Module, tuple[str, Region]]


class restrict(Waiting):
    """Within this context the modifications of `model` act at the given positions alone:

        with tokengate.restrict(model, mask): ...                       # (B, T), True is inside
        with tokengate.restrict(model, {"*.q_proj": mask}): ...         # of these layers alone
        with tokengate.restrict(model, lambda name, shape: mask): ...   # asked at each call
        with tokengate.restrict(model, tokengate.after([5, 17])): ...   # the suffix only

    h_i = w_i + restriction_i a_i m_i: outside, a layer is the base, bit for bit, whatever its gate
    says, also with `gate=False`; and its keys and values are the base's, so that a cache of what is
    outside serves every adapter. These positions count in neither mu, lambda nor sparsity. Nested
    restrictions multiply.

    A mask of whole sequences is for the module that receives them: with a cache it is aligned by
    how many positions that has, and beams of one sample share its row. It belongs to this thread or
    task: other ones run as they did. Compiled code is compiled anew for each restriction, with
    masks of calls without a cache; others are refused.

    Args:
        model: a patched model.
        where: a mask `(B, T)`, of booleans or of weights in [0, 1], beside convolutions `(B, H, W)`
            of the layer's own resolution; a dict from patterns over the
            layers' names to masks (a layer follows the first that matches, others are free); a
            function of a layer's name and its positions' shape, which returns a mask of
            that shape, True or False; or `after(token_ids)`.
        new: whether positions beyond a mask's end, which are generated, are inside.

    Raises:
        TokenGateError: no layer is patched; the model is folded; `where` is none of these, or a
            pattern matches no patched layer; `new=False` is given without a mask. In a forward: a
            mask does not fit a layer's call.
    """

    def __init__(self, model: nn.Module, where: Any, *, new: bool = True) -> None:
        patched = all_layers(model)
        if not patched and not folded(model):
            raise TokenGateError(
                f"restrict was asked of a {type(model).__name__} without a patched layer: call "
                "tokengate.patch(model, targets=...) first, and pass that model."
            )
        if folded(model):
            raise TokenGateError(
                "restrict was asked of a model that is folded, where merged layers act everywhere: "
                "call the folding's undo() first."
            )
        regions = _by_layer(where, list(patched), switch("new", new))
        if not new and not any(isinstance(region.where, Tensor) for region in regions.values()):
            unused("restrict", "without a mask (B, T), which alone has an end", new=new)
        for name, region in regions.items():
            if may_be_idle(name, patched[name]) and not callable(region.where):
                raise TokenGateError(
                    f"restrict was given a mask of whole sequences for {name!r}, an expert, which "
                    "sees the positions that are routed there: restrict other layers, "
                    "{'pattern': mask}, or pass a function (name, shape) -> mask."
                )
        self._regions: Said = {patched[name]: (name, each) for name, each in regions.items()}
        self._called, self._waits = "restrict", True

    def __enter__(self) -> None:
        self._waits = False
        enter(RESTRICT, _anew(self._regions), self, windows=True)

    def __exit__(self, *error: object) -> None:
        leave(self)


def _anew(regions: Said) -> Said:
    """What a region has seen belongs to one context, also where others enter the same object."""
    anew = {region: region.anew() for _, region in regions.values()}
    return {layer: (name, anew[region]) for layer, (name, region) in regions.items()}


def kept(context: Context) -> Said | None:
    """What a restriction says, for `said_again`; None of functions, which may say something else.

    Of its masks these are copies.
    """
    copies: dict[Region, Region] = {}
    for _, region in context.layers.values():
        if isinstance(region.where, Tensor):
            if region not in copies:
                copies[region] = Region(region.where.detach().clone(), region.new)
        elif isinstance(region.where, After):
            copies[region] = region
        else:
            return None
    return {layer: (name, copies[region]) for layer, (name, region) in context.layers.items()}


def said_again(regions: Said) -> AbstractContextManager[None]:
    """Within this context what was `kept` holds once more."""
    return in_context(RESTRICT, _anew(regions), windows=True)


def _by_layer(where: Any, names: list[str], new: bool) -> dict[str, Region]:
    if not isinstance(where, Mapping):
        region = Region(valid_where("restrict", where), new)
        return dict.fromkeys(names, region)
    patterns = as_patterns("restrict", [*where])
    regions = {p: Region(valid_where("restrict", where[p]), new) for p in patterns}
    found: dict[str, Region] = {}
    used: set[Pattern] = set()
    for name in names:
        pattern = next((p for p in patterns if matches(p, name)), None)
        if pattern is not None:
            used.add(pattern)
            found[name] = regions[pattern]
    for pattern in patterns:
        if pattern not in used:
            raise TokenGateError(
                f"restrict names {show(pattern)}, which matches no patched layer: correct it or "
                f"take it out; {nearest(pattern, names)}."
            )
    return found
