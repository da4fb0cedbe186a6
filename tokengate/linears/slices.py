"""How several projections are fused in one linear layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tokengate.arguments import count
from tokengate.errors import TokenGateError


class Slices:
    """Which outputs of a fused linear layer are which projection.

        Slices(q=768, k=768, v=768)          # all of q, then all of k, then all of v
        Slices(groups=12, q=64, k=64, v=64)  # q, k and v of the first head, then of the second...

    Args:
        groups: how many times the sizes repeat.
        **sizes: outputs of each projection in one group, in their order.

    Raises:
        TokenGateError: a number is not a positive integer; there are no sizes; a name could not be
            that of a module.
    """

    def __init__(self, *, groups: int = 1, **sizes: int) -> None:
        if not sizes:
            raise TokenGateError("Slices was given no sizes: name them, e.g. Slices(q=64, kv=128).")
        for name in sizes:
            if not name.isidentifier() or name.startswith("_"):
                raise TokenGateError(
                    f"Slices was given the name {name!r}: name each slice by one word, e.g. 'q'."
                )
        self.groups = count("groups", groups)
        self.sizes = {name: count(name, size) for name, size in sizes.items()}

    @property
    def out_features(self) -> int:
        """Outputs of all projections together."""
        return self.groups * sum(self.sizes.values())

    def place(self, name: str) -> tuple[int, int]:
        """Where in each group the projection begins, and how many outputs it has there."""
        before = 0
        for own, size in self.sizes.items():
            if own == name:
                return before, size
            before += size
        raise KeyError(name)

    def take(self, fused: Tensor, name: str, dim: int = -1) -> Tensor:
        """One projection's part: `(..., out_features) -> (..., groups * size)`, at `dim`.

        A view, where there is one group.
        """
        piece = self._in_groups(fused, dim)[name]
        return piece.flatten(-2) if dim == -1 else piece.flatten(dim, dim + 1)

    def put(self, fused: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """`fused` with other parts: `(..., out_features) -> (..., out_features)`, not in place."""
        pieces = self._in_groups(fused)
        pieces |= {n: torch.unflatten(part, -1, (self.groups, -1)) for n, part in parts.items()}
        return torch.cat(list(pieces.values()), -1).flatten(-2)

    def write(self, fused: Tensor, name: str, part: Tensor, dim: int = 0) -> None:
        """Put one projection's part, `(groups * size, ...)`, into `fused`, `(out_features, ...)`,
        in place; their outputs are at `dim`.
        """
        self._in_groups(fused, dim)[name].copy_(torch.unflatten(part, dim, (self.groups, -1)))

    def _in_groups(self, fused: Tensor, dim: int = -1) -> dict[str, Tensor]:
        grouped = torch.unflatten(fused, dim, (self.groups, -1))
        within = -1 if dim == -1 else dim + 1
        pieces = torch.split(grouped, list(self.sizes.values()), within)
        return dict(zip(self.sizes, pieces, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slices) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, tuple[tuple[str, int], ...]]:
        return self.groups, tuple(self.sizes.items())

    def __repr__(self) -> str:
        groups = "" if self.groups == 1 else f"groups={self.groups}, "
        return f"Slices({groups}{', '.join(f'{n}={size}' for n, size in self.sizes.items())})"
