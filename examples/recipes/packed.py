"""Files that may be compressed."""

from __future__ import annotations

import lzma
from pathlib import Path


def read_bytes(path: Path) -> bytes:
    """What is in a file, or in the one beside it that ends in .xz, or does itself.

    Raises:
        FileNotFoundError: there is neither.
    """
    if not path.exists():
        path = path.with_name(path.name + ".xz")
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
