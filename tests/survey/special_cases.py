"""What cannot be guessed of an architecture of transformers: fields of its configuration, inputs.

By model type. `fields` is given to the configuration's class beside what was shrunk, `inputs` makes
the keyword arguments of forward, and `unbuilt` says why none can be built here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Special:
    fields: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], dict[str, Any]] | None = None
    unbuilt: str = ""


SPECIAL: dict[str, Special] = {}
