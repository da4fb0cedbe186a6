"""What has hooked itself into an optimiser, whose hooks stay behind where both are copied."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

from tokengate.errors import LeftOutWarning, TokenGateError

_Self = TypeVar("_Self", bound="Hooked")


class Hooked:
    """A copy of it is detached, as it is by `unhook`; it is not pickled while it is hooked."""

    _hooks: list[Any]

    @property
    def called(self) -> str:
        """What users know it by."""
        return type(self).__name__

    def unhook(self) -> None:
        """Take the hooks off the optimiser, for good."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def check_hooked(self) -> None:
        """An error if a state was to be loaded into what is detached."""
        if not self._hooks:
            raise TokenGateError(
                f"a state was to be loaded into a {self.called} that is detached, or the copy of "
                "one, and so leads nothing: make a new one for this model and its optimizer, and "
                "load the state there."
            )

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__ |= copy.deepcopy({**vars(self), "_hooks": []}, memo)
        if self._hooks:
            warnings.warn(
                f"a {self.called} was copied, and its copy leads nothing, since no hook of an "
                "optimizer is copied: make one for the copied model and its optimizer, and load "
                "this one's state_dict() there.",
                LeftOutWarning,
                stacklevel=2,
            )
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._hooks:
            raise TokenGateError(
                f"a {self.called} was to be pickled, and would lead nothing where it is read: save "
                "its state_dict(), and load that into one that is made there."
            )
        return super().__reduce_ex__(protocol)
