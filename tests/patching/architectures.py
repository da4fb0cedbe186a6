"""The architectures that tokengate is run on, and the table of them in integrations/README.md.

    python tests/patching/architectures.py    # writes the table

An architecture is a model from a small config with random weights, how to run it, and what to
patch: roles, or names where the host has no roles.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

README = pathlib.Path(__file__).parents[2] / "integrations" / "README.md"
BEGIN, END = "<!-- the table, from `python tests/patching/architectures.py` -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Architecture:
    """One model. `what` is roles where `roles` is given, names as `patch` takes them otherwise."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    what: tuple[str, ...]
    roles: Callable[..., list[str]] | None = None

    @property
    def host(self) -> str:
        return self.name.partition("/")[0]

    def targets(self, model: nn.Module) -> list[str]:
        return self.roles(model, *self.what) if self.roles else list(self.what)


@dataclass(frozen=True)
class Refusal:
    """What cannot be patched, and what the error `says` of it, as a regular expression."""

    name: str
    build: Callable[[], nn.Module]
    what: tuple[str, ...]
    says: str
    roles: Callable[..., list[str]] | None = None


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


def tokens(length: int = 9, vocabulary: int = 90) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, vocabulary, (2, length), generator=generator)


def table(architectures: list[Architecture]) -> str:
    """One row for each: its name, what is patched, and in how many layers."""
    import tokengate

    rows = ["| architecture | patched | layers |", "|---|---|--:|"]
    for one in architectures:
        model = one.build()
        tokengate.patch(model, one.targets(model), rank=1)
        patched = ", ".join(one.what) if one.roles else ", ".join(f"`{w}`" for w in one.what)
        rows.append(f"| {one.name} | {patched} | {len(tokengate.layers(model))} |")
    counts = {host: sum(a.host == host for a in architectures) for host in HOSTS}
    counted = ", ".join(f"{host} {count}" for host, count in counts.items())
    return f"{len(architectures)} architectures: {counted}.\n\n" + "\n".join(rows) + "\n"


HOSTS = ("transformers", "timm", "torch", "torchvision", "open_clip")


if __name__ == "__main__":
    from architectures_text import TEXT
    from architectures_vision import VISION

    torch.set_num_threads(1)
    before, _, rest = README.read_text().partition(BEGIN)
    if not rest:
        sys.exit(f"{README} has no line {BEGIN.strip()!r}: put one where the table belongs.")
    README.write_text(before + BEGIN + table(TEXT + VISION) + END + rest.partition(END)[2])
