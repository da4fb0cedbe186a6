"""Which rows of a batch belong to which adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tokengate.errors import TokenGateError


class Rows:
    """One adapter's name, or None for the base model, for each row of a batch.

    Args:
        names: as many as the batch has rows.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)
        self._known: dict[tuple[int, torch.device], list[tuple[str, Tensor]]] = {}

    def of(self, input: Tensor, dim: int, mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """For each adapter, which places along `dim` of a layer's input are its own.

        A batch may come flattened, `(B T, in_features)`, if its padding mask `(B, T)` says so:
        otherwise positions could be any, as those that are routed to an expert.

        Raises:
            TokenGateError: the batch has another number of rows.
        """
        count, rows = input.shape[dim], len(self.names)
        flattened = input.dim() == 2 and mask is not None and len(mask) == rows
        if count != rows and not flattened:
            raise TokenGateError(
                f"tokengate.use was given adapters for {rows} rows, and a layer was called with "
                f"{count} (an input of shape {tuple(input.shape)}): pass one name, or None, for "
                "each row of the batch."
            )
        key = (count, input.device)
        if key not in self._known:
            each = [name for name in self.names for _ in range(count // rows)]
            places: dict[str, list[int]] = {}
            for place, name in enumerate(each):
                if name is not None:
                    places.setdefault(name, []).append(place)
            with torch.inference_mode(False):  # a later forward may be trained through
                self._known[key] = [
                    (name, torch.tensor(own, device=input.device)) for name, own in places.items()
                ]
        return iter(self._known[key])
