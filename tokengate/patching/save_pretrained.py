"""A word where a patched model is saved as a whole model is, which reading it back would not give.

`save_pretrained` of Hugging Face's libraries (transformers, diffusers, sentence-transformers, what
has huggingface_hub's mixin) writes all keys of a model, and `from_pretrained` leaves out those that
it does not know: what is patched is gone, without an error. The method is told to look once, in the
class that has it: an attribute of a model that knew its model would keep it alive.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tokengate.errors import SavedWithBaseWarning
from tokengate.layers.folded import folded
from tokengate.layers.patched import all_layers

_NAME = "save_pretrained"
# On a method that looks already.
_LOOKS = "_tokengate_looks"
# Whether a module that is saved is a part of one that is, of which enough was said.
_SAVING = contextvars.ContextVar("tokengate_saving", default=False)
# What a Trainer writes to go on from, reading it into the patched model again.
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def watch_saving(model: nn.Module) -> None:
    """From now on `save_pretrained` of such models, and of what is in them, warns where it should.

    Of a model without a patched layer it does what it did.
    """
    for kind in {each for module in model.modules() for each in type(module).__mro__}:
        method = vars(kind).get(_NAME)
        if inspect.isfunction(method) and not hasattr(method, _LOOKS):
            setattr(kind, _NAME, _looking(method))


def _looking(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _SAVING.get() and not any(map(_is_checkpoint, (*args, *kwargs.values()))):
            _warn(self)
        token = _SAVING.set(True)
        try:
            return method(self, *args, **kwargs)
        finally:
            _SAVING.reset(token)

    setattr(save_pretrained, _LOOKS, True)
    return save_pretrained


def _warn(module: Any) -> None:
    kept = len(all_layers(module)) if isinstance(module, nn.Module) else 0
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
