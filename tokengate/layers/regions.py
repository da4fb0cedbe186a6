"""Where modifications may act at this time, in this thread and task: what layers ask of that.

`restriction` has what users say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError, brief
from tokengate.kernels.eager import is_exported
from tokengate.layers.calls import (
    RESTRICT,
    Context,
    Window,
    contexts,
    in_decoder,
    said_of,
    window_around,
)

_UNSEEN = -1  # is no token
_WAITING = 32  # calls whose cache may come back


class After:
    """What `after` made: positions from the last occurrence of some tokens on."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.ids = token_ids
        # The text that each cache has, as far as it was seen here; -1 where it was not.
        self._texts: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        # Those of calls that may have made a cache of their own, which is known when it comes back.
        self._loose: list[Tensor] = []

    def first(self, window: Window, name: str) -> Tensor:
        """In each row, the first position inside, `(B, 1)`; beyond the end if there is none."""
        if self not in window.memo:
            if window.ids is None:
                raise TokenGateError(
                    f"tokengate.after cannot tell where the tokens of {name!r} are, since no "
                    "module around it was called with input_ids: pass a mask, or restrict other "
                    "layers alone, {'pattern': tokengate.after(...)}."
                )
            window.memo[self] = self._found(window, window.ids, name)
        first: Tensor = window.memo[self]
        return first

    def _found(self, window: Window, ids: Tensor, name: str) -> Tensor:
        before = ids.new_full((ids.shape[0], window.start), _UNSEEN)
        lasting = hasattr(window.cache, "__weakref__")  # a tuple is another one in each call
        seen = self._texts.get(window.cache) if lasting else None
        if seen is None and window.cache is not None:
            seen = self._made(before)
        if seen is not None and len(seen) == len(ids) and seen.shape[1] >= window.start:
            before = seen[:, : window.start].to(ids.device)  # what was cropped is forgotten
        text = torch.cat([before, ids], 1)
        if lasting:
            self._texts[window.cache] = text
        elif not is_exported():
            self._loose = [*self._loose[1 - _WAITING :], text]
        searched = text
        if window.real is not None and window.real.shape == text.shape:
            searched = text.masked_fill(window.real.to(text.device) == 0, _UNSEEN)
        never = torch.iinfo(torch.long).max
        first = torch.full((ids.shape[0], 1), never, device=ids.device)
        wanted = torch.tensor(self.ids, device=ids.device)
        if text.shape[1] >= len(wanted):
            hits = (searched.unfold(1, len(wanted), 1) == wanted).all(-1)
            places = torch.arange(hits.shape[1], device=ids.device).expand_as(hits)
            last = torch.where(hits, places, -1).amax(1, keepdim=True)
            first = torch.where(last >= 0, last, first)
        if window.start and (before == _UNSEEN).any() and (first == never).any():
            raise TokenGateError(
                f"tokengate.after cannot tell whether {name!r} is called after its tokens: the "
                f"cache has {window.start} positions that were not seen in this context: compute "
                "them within it, or pass a mask."
            )
        return first

    def _made(self, before: Tensor) -> Tensor | None:
        """The one text that a cache of so many positions can be of; None if there are others."""
        alike = [text for text in self._loose if text.shape == before.shape]
        one = bool(alike) and all(torch.equal(text, alike[0]) for text in alike)
        return alike[0] if one else None


def after(token_ids: Sequence[int]) -> After:
    """For `restrict`: the positions from the last occurrence of these tokens on, row by row.

    As an activated LoRA's (aLoRA) invocation: the tokens themselves are inside. A row without them
    runs as the base. They are looked for, padding left out, in the `input_ids` that the module
    around a layer is called with and in those that its cache was made of; what is generated is
    inside if its row has them; without a cache, from the last of them on, be it generated itself.

    Args:
        token_ids: one or more, in their order.

    Raises:
        TokenGateError: these are no token ids.
    """
    ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
    ids = list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else []
    if not ids or any(type(each) is not int or each < 0 for each in ids):
        raise TokenGateError(
            f"after was given {brief(token_ids)}: pass the ids of one or more tokens, [5, 17]."
        )
    return After(ids)


@dataclass(eq=False)
class Region:
    """One mask of a restriction, and how far calls have come that it fits."""

    where: Any
    new: bool
    reached: int = 0

    def anew(self) -> Region:
        """The same, which has seen no call yet."""
        where = After(self.where.ids) if isinstance(self.where, After) else self.where
        return Region(where, self.new)

    def of(self, name: str, shape: torch.Size, window: Window | None) -> Tensor | bool:
        """Which positions of a call of the layer are inside: of `shape`, or one truth for all."""
        if 0 in shape:  # an expert without tokens
            return True
        if isinstance(self.where, Tensor):
            return self._aligned(self.where, name, shape, window or Window(0))
        if isinstance(self.where, After):
            window = window or Window(0)
            first = self.where.first(window, name)
            rows = first.shape[0]
            length = math.prod(shape) // rows
            if shape not in ((rows, length), (rows * length,)) or (
                window.length not in (None, length)
            ):
                raise self._unfit(name, shape, f"rows of {window.length} tokens in {rows} rows")
            places = torch.arange(window.start, window.start + length, device=first.device)
            return (places >= first).reshape(shape)
        found = self.where(name, shape)
        if isinstance(found, bool):
            return found
        if not isinstance(found, Tensor) or found.shape != shape:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else brief(found)
            raise TokenGateError(
                f"a region's function returned {what} for {name!r}, called with positions of shape "
                f"{tuple(shape)}: return a mask of that shape, True or False."
            )
        return checked_mask(found)

    def _aligned(self, mask: Tensor, name: str, shape: torch.Size, window: Window) -> Tensor:
        """Of a mask `(B, T)` of whole sequences, the part that a call is about."""
        if (
            window.start == 0
            and mask.numel() == shape.numel()
            and (mask.shape == shape or len(shape) == 1)
        ):
            self.reached = mask.shape[-1]
            return mask.reshape(shape)
        length = shape[-1] if len(shape) == 2 else window.length
        if mask.dim() != 2 or length is None or shape.numel() % (length * len(mask)):
            raise self._unfit(name, shape, f"a mask of shape {tuple(mask.shape)}")
        end = window.start + length
        # Longer than the mask is only what goes on from what it fitted: generated tokens, which
        # without a cache come one by one.
        goes_on = window.start <= self.reached and (window.start or end <= self.reached + 1)
        if end > mask.shape[1] and not (self.reached >= mask.shape[1] and goes_on):
            raise self._unfit(name, shape, f"a mask of shape {tuple(mask.shape)}")
        if window.start == 0 and end < mask.shape[1] and not window.cached:
            raise self._unfit(name, shape, f"a mask of shape {tuple(mask.shape)}")
        part = mask[:, window.start : end]
        beyond = length - part.shape[1]
        if beyond:
            part = torch.cat([part, part.new_full((len(mask), beyond), self.new)], 1)
        self.reached = end
        beams = shape.numel() // part.numel()
        if beams > 1 and window.ids is None:
            raise self._unfit(name, shape, f"a mask of shape {tuple(mask.shape)}")
        # Beams of one sample stand side by side.
        return part.repeat_interleave(beams, 0).reshape(shape)

    def _unfit(self, name: str, shape: torch.Size, what: str) -> TokenGateError:
        remedy = "pass a mask (B, T) of whole sequences, or one for each kind of layer"
        if len(shape) == 3:  # pixels, of which layers have more or fewer
            remedy = "pass a function (name, shape) -> mask that resizes it, or one for each size"
        return TokenGateError(
            f"a region was given as {what}, which does not fit {name!r}, called with positions of "
            f"shape {tuple(shape)}: {remedy}, {{'pattern': mask}}."
        )


class RowsRegion(Region):
    """Some rows of every batch, for layers whose positions come flattened, as experts' do.

    Args:
        rows: whether each row is inside.
    """

    def __init__(self, rows: Sequence[bool]) -> None:
        super().__init__(list(rows), True)

    def of(self, name: str, shape: torch.Size, window: Window | None) -> Tensor | bool:
        rows, positions = len(self.where), math.prod(shape)
        length = shape[-1] if len(shape) == 2 else None if window is None else window.length
        beams = 1 if not length else positions / (rows * length)
        if length is None or beams != (int(beams) if in_decoder() else 1):
            raise TokenGateError(
                f"tokengate.use was given adapters for {rows} rows, and {name!r}, an expert's, was "
                f"called with {positions} positions, of rows of {length or 'unknown'} length: pass "
                "one name, or None, for each row of the batch, and call the model with input_ids, "
                "or inputs_embeds, of (B, T)."
            )
        each = torch.tensor(self.where)
        return each.repeat_interleave(positions // rows).reshape(shape)


class Regional:
    """Several adapters, each at its own positions, while `use` was given a dict.

    Args:
        names: of the layers.
        regions: of each adapter, by its name.

    Attributes:
        adapters: their names.
    """

    def __init__(self, names: Mapping[nn.Module, str], regions: Mapping[str, Region]) -> None:
        self.names, self.regions, self.adapters = names, regions, regions.keys()

    def of(
        self, layer: nn.Module, shape: torch.Size, states: Tensor, elsewhere: bool
    ) -> tuple[Tensor, ...]:
        """As `inside` below, for each adapter in their order."""
        name = self.names.get(layer, "a layer")
        regions = self.regions.values()
        return tuple(_asked(region, name, shape, states, elsewhere) for region in regions)


def inside(layer: nn.Module, shape: torch.Size, states: Tensor, elsewhere: bool) -> Tensor | None:
    """How much of M(x) the restrictions let through, of `shape`; None where there is none.

    Args:
        layer: that is called.
        shape: of its positions, samples first.
        states: its input.
        elsewhere: whether that is not what the modules around were called with, but what they
            attend to.
    """
    found: Tensor | None = None
    for name, region in said_of(layer, RESTRICT):
        part = _asked(region, name, shape, states, elsewhere)
        if found is None:
            found = part
        elif found.dtype == part.dtype == torch.bool:
            found = found & part
        else:
            found = found * part
    return found


def _asked(region: Region, name: str, shape: torch.Size, states: Tensor, elsewhere: bool) -> Tensor:
    """What one region says of a call, as a tensor beside its input."""
    part = region.of(name, shape, Window(0) if elsewhere else window_around(states))
    if isinstance(part, bool):
        return torch.full(shape, part, device=states.device)
    return part.to(states.device)


def valid_where(asked: str, where: Any) -> Any:
    """What tells positions: a checked mask, a function or `After`; `asked` is for the errors."""
    if isinstance(where, Tensor):
        if where.dim() == 0:
            raise TokenGateError(f"{asked} was given a single number: pass a mask (B, T).")
        return checked_mask(where)
    if isinstance(where, After) or (callable(where) and not isinstance(where, re.Pattern)):
        return where
    raise TokenGateError(
        f"{asked} was given {brief(where)}: pass a mask (B, T), a function (name, shape) -> mask, "
        "tokengate.after(token_ids), or a dict of these."
    )


def checked_mask(mask: Tensor) -> Tensor:
    """As booleans, or as weights where it has others than 0 and 1."""
    if mask.dtype == torch.bool:
        return mask
    if not torch.compiler.is_compiling():
        if not ((mask >= 0) & (mask <= 1)).all():
            raise TokenGateError(
                "a region was given as a mask with values outside [0, 1]: pass booleans or weights."
            )
        # Those with gradients are asked for them: a_i mu_i.
        if ((mask == 0) | (mask == 1)).all() and not mask.requires_grad:
            return mask != 0
    return mask


# Of a cache that does not tell: within which contexts it was seen, and how many positions it has.
_SEEN: WeakKeyDictionary[Any, tuple[set[Context], int]] = WeakKeyDictionary()


def length_of(cache: Any, length: int) -> int | None:
    """How many positions a cache has, which is given `length` more; None if nobody knows."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # of a state alone, as Mamba's
        has_state = getattr(cache, "has_previous_state", None)
    if has_state is None:
        return None
    around = window_around()
    if around is not None and around.cache is cache:  # of the same call
        return around.start
    here = {context for context in contexts() if context.windows}
    seen_in, known = _SEEN.get(cache, (set(), 0)) if has_state() else (here, 0)
    if here.isdisjoint(seen_in):
        return None
    _SEEN[cache] = (here, known + length)
    return known
