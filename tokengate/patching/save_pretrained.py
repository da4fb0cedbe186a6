"""A word where a patched model is saved as a whole model is, which reading it back would not give.

`save_pretrained` of Hugging Face's libraries (transformers, diffusers, sentence-transformers, what
has huggingface_hub's mixin) writes all keys of a model, and `from_pretrained` leaves out those that
it does not know: what is patched is gone, without an error.
"""

from __future__ import annotations

import contextvars
import copy
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

from torch import nn

from tokengate.errors import SavedWithBaseWarning
from tokengate.layers.folded import folded
from tokengate.layers.patched import all_layers

_NAME = "save_pretrained"
# Whether a module that is saved is a part of one that is, of which enough was said.
_SAVING = contextvars.ContextVar("tokengate_saving", default=False)
# What a Trainer writes to go on from, reading it into the patched model again.
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def watch_saving(model: nn.Module) -> None:
    """From now on `save_pretrained` of the model, and of what is in it, warns where it should."""
    for module in model.modules():
        if callable(getattr(type(module), _NAME, None)):
            module.__dict__.setdefault(_NAME, _Watched(module))


def unwatch_saving(model: nn.Module) -> None:
    """Take back what `watch_saving` did."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_NAME), _Watched):
            del module.__dict__[_NAME]


class _Watched:
    """What stands in the place of a module's method, and goes along in its copies."""

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)  # a module that held itself would be freed late

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own; whoever asks for a signature gets this one's."""
        method: Callable[..., Any] = getattr(type(self._held()), _NAME).__get__(self._held())
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _SAVING.get() and not any(map(_is_checkpoint, (*args, *kwargs.values()))):
            _warn(self._held())
        token = _SAVING.set(True)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            _SAVING.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watched:
        copied: nn.Module = copy.deepcopy(self._held(), memo)
        return _Watched(copied)

    def __reduce__(self) -> Any:
        return _Watched, (self._held(),)

    def _held(self) -> nn.Module:
        module = self._module()
        assert module is not None  # which holds this
        return module


def _warn(module: nn.Module) -> None:
    kept = len(all_layers(module))
    if not kept:
        return  # plain, or folded as a whole
    merged = sum(each.weight is not None for each in folded(module).values())
    gives = f"a mixture of the base and of {merged} layers that fold has merged" if merged else ""
    warnings.warn(
        f"{type(module).__name__}.{_NAME} writes the keys of {kept} patched layers, which "
        f"from_pretrained leaves out, so that reading it gives {gives or 'the base'}: write the "
        "adapter with tokengate.save(model, folder), which tokengate.load(base, folder) reads, or "
        "call tokengate.unpatch(model) before.",
        SavedWithBaseWarning,
        stacklevel=3,
    )


def _is_checkpoint(argument: Any) -> bool:
    if not isinstance(argument, (str, os.PathLike)):
        return False
    return any(_CHECKPOINT.fullmatch(part) for part in Path(argument).parts)
