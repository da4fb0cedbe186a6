"""Several projections fused in one linear layer, and each of them as a layer of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokengate.arguments import count
from tokengate.errors import TokenGateError
from tokengate.linear_like import LinearLike, features_of, weight_of


class Slices:
    """Which outputs of a fused linear layer are which projection.

        Slices(q=768, k=768, v=768)          # all of q, then all of k, then all of v
        Slices(groups=12, q=64, k=64, v=64)  # q, k and v of the first head, then of the second...

    Args:
        groups: how many times the sizes repeat.
        **sizes: outputs of each projection in one group, in their order.

    Raises:
        TokenGateError: a number is not a positive integer, or there are no sizes.
    """

    def __init__(self, *, groups: int = 1, **sizes: int) -> None:
        if not sizes:
            raise TokenGateError("Slices was given no sizes: name them, e.g. Slices(q=64, kv=128).")
        self.groups = count("groups", groups)
        self.sizes = {name: count(name, size) for name, size in sizes.items()}

    @property
    def out_features(self) -> int:
        """Outputs of all projections together."""
        return self.groups * sum(self.sizes.values())

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


class LinearSlice(nn.Module):
    """One projection of a fused linear layer: `(..., in_features) -> (..., out_features)`.

    It has no parameters of its own: `weight` and `bias` are the fused layer's.

    Args:
        fused: the layer.
        slices: what it holds.
        name: which of them this is.
    """

    fused: LinearLike

    def __init__(self, fused: LinearLike, slices: Slices, name: str) -> None:
        super().__init__()
        # Past nn.Module, which would make the layer a child of its own child.
        object.__setattr__(self, "fused", fused)
        self.slices, self.name = slices, name
        self.training = fused.training
        self.in_features = features_of(fused)[0]
        self.out_features = slices.groups * slices.sizes[name]

    @property
    def weight(self) -> Tensor:
        """`(out_features, in_features)`; a view, where the rows are in one group."""
        return self.slices.take(weight_of(self.fused), self.name, 0)

    @property
    def bias(self) -> Tensor | None:
        """`(out_features,)`, or None."""
        return None if self.fused.bias is None else self.slices.take(self.fused.bias, self.name)

    def forward(self, input: Tensor, out: Tensor) -> Tensor:
        """`out`, which is this projection of `input` as the fused layer computed it."""
        return out

    def extra_repr(self) -> str:
        return f"{self.name} of {self.slices}"
