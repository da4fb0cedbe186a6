"""What functions return that have changed a model in place: not the model, as PEFT's would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokengate.errors import TokenGateError


class _NotTheModel(TokenGateError, AttributeError):
    """What a model has was asked of what is none."""


class Told:
    """What a function returns that changed a model in place: no model, as that of PEFT's would be.

    Asked for what a model has it says so.
    """

    _by = ""
    """That function."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise self._no_model(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._no_model("a forward")

    def _no_model(self, asked: str) -> TokenGateError:
        return _NotTheModel(
            f"{asked} was asked of what {self._by} returned, which tells what was done and is no "
            f"model: go on with the one that {self._by} was given and has changed in place."
        )


class Skipped(Told, dict[str, str]):
    """What does not fit a model and was left out, and why."""

    def __init__(self, by: str, found: Mapping[str, str]) -> None:
        super().__init__(found)
        self._by = by
