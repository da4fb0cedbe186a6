"""Any trainer's class as one for patched models."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import Trainer

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.integrations.trainer.trainer import TokenGateTrainer
from tokengate.integrations.trl.views import Reference, reference
from tokengate.layers.patched import all_layers

# In the modules of TRL's trainers, what makes a model of a name: the reference, where there is one.
_MAKER = "create_model_from_path"


@functools.cache
def gated(trainer: type[Trainer]) -> type[Any]:
    """`trainer` as a `TokenGateTrainer`, whose reference, if it has one, is a view of its model:

        gated(SFTTrainer)(model, args, train_dataset=data, callbacks=[TokenGateCallback(s=5e-4)])
        gated(GRPOTrainer)(model, ..., ref_model=reference(model, "before"))

    Takes what `trainer` takes; `ref_model=`, too, where that makes its reference by itself. Without
    one, the reference is `reference(model)`, the base model.

    Args:
        trainer: a class of TRL's, of transformers', or of anybody's who inherits from these.

    Raises:
        TokenGateError: it is no such class; when it is used, as of `reference` and
            `TokenGateTrainer`; `ref_model=` was given to a trainer that wants none, or
            `sync_ref_model` asked of a view.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise TokenGateError(
            f"gated was given {brief(trainer)}: pass a class that inherits from "
            "transformers.Trainer, e.g. trl.SFTTrainer."
        )
    return type(f"Gated{trainer.__name__}", (_Gated, trainer), {"_kind": trainer})


class _Gated(TokenGateTrainer):
    _kind: type[Trainer]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(self._kind.__init__)
        takes_one = "ref_model" in signature.parameters
        theirs = None if takes_one else kwargs.pop("ref_model", None)
        bound = signature.bind_partial(self, *args, **kwargs)
        given = bound.arguments
        model = given.get("model")
        patched = isinstance(model, nn.Module) and bool(all_layers(model))
        if patched and takes_one and given.get("ref_model") is None:
            given["ref_model"] = reference(model)
        asked: list[Any] = []

        def answer() -> Any:
            asked.append(reference(model) if theirs is None else theirs)
            return asked[-1]

        with _in_place_of_copies(self._kind, model if patched else None, answer):
            super().__init__(*bound.args[1:], **bound.kwargs)
        kind = self._kind.__name__
        if theirs is not None and not asked:
            raise TokenGateError(
                f"ref_model= was given to a {kind} that compares with no reference: drop it, or "
                "let the arguments ask for one, as beta above 0 does."
            )
        synced = getattr(self.args, "sync_ref_model", False)
        if synced and isinstance(getattr(self, "ref_model", None), Reference):
            raise TokenGateError(
                f"sync_ref_model=True was asked of a {kind} whose reference is a view of its own "
                "model, into which nothing can be written: drop it, or pass another ref_model=."
            )


@contextlib.contextmanager
def _in_place_of_copies(
    kind: type[Trainer], model: nn.Module | None, answer: Callable[[], Any]
) -> Iterator[None]:
    """Within it, `answer` gives what TRL would make of the name of `model`'s base once more."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    with contextlib.ExitStack() as stack:
        for module in {sys.modules[each.__module__] for each in kind.__mro__}:
            plain = getattr(module, _MAKER, None)
            if plain is not None and name is not None:
                setattr(module, _MAKER, _answering(name, answer, plain))
                stack.callback(setattr, module, _MAKER, plain)
        yield


def _answering(
    name: str, answer: Callable[[], Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    def make(path: str, *args: Any, **kwargs: Any) -> Any:
        return answer() if path == name else plain(path, *args, **kwargs)

    return make
