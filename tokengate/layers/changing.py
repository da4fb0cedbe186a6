"""What changes a model is done alone, and whole; interrupted, it leaves the model as it was."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError
from tokengate.layers.calls import DISABLED, OPEN, RESTRICT, RUNNING, contexts

_Function = TypeVar("_Function", bound=Callable[..., Any])

_CHANGING = threading.RLock()
_times = 0


def times_changed() -> int:
    """How often any model may have got other parameters, or put others in use."""
    return _times


def count_change() -> None:
    """One did, once more."""
    global _times
    _times += 1


def busy_elsewhere(model: nn.Module) -> str | None:
    """What another thread does with the model at this time; None if there is none."""
    if not OPEN and not RUNNING:
        return None
    here, modules = threading.get_ident(), set(model.modules())
    alive = {thread.ident for thread in threading.enumerate()} - {here}
    for thread, running in list(RUNNING.items()):
        if thread in alive and any(call.module in modules for call in list(running)):
            return "runs it"
    for context in list(OPEN.values()):
        if context.thread in alive and not modules.isdisjoint(context.layers):
            return f"is in {context.kind}"
    return None


@contextlib.contextmanager
def changing(model: Any, asked: str) -> Iterator[None]:
    """Within this context no other thread changes a model; an error if one is using this one.

    Args:
        model: what is to be changed.
        asked: the function that was called, for the error.
    """
    with _CHANGING:
        busy = busy_elsewhere(model) if isinstance(model, nn.Module) else None
        if busy is not None:
            raise TokenGateError(
                f"{asked} was asked of a {type(model).__name__} while another thread {busy}: wait "
                "until it has left, or change the model before it is shared."
            )
        try:
            yield
        finally:
            count_change()


def refuse_within(present: Collection[nn.Module], added: Iterable[nn.Module]) -> None:
    """An error if contexts around are about the layers that are `present`, and not those `added`.

    What restricts a model, or disables it, was told which layers it has.
    """
    new = [layer for layer in added if layer not in present]
    for context in contexts():
        about = context.kind in (DISABLED, RESTRICT) and any(p in context.layers for p in present)
        if about and any(layer not in context.layers for layer in new):
            raise TokenGateError(
                f"more layers than before, {len(new)}, were to be patched within "
                f"tokengate.{context.kind}, which was told of the others and would not hold of "
                "them: patch or load before the block."
            )


def exclusive(function: _Function) -> _Function:
    """For what changes what a `model` has: its whole call is within `changing`."""

    @functools.wraps(function)
    def alone(model: Any, *args: Any, **kwargs: Any) -> Any:
        with changing(model, function.__name__):
            return function(model, *args, **kwargs)

    return cast(_Function, alone)


@contextlib.contextmanager
def all_or_nothing(
    modules: Iterable[nn.Module],
    written: Iterable[Tensor] = (),
    undo: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Whoever leaves this context by an exception, Ctrl-C too, finds the modules as they were.

    That is their classes, attributes, entries and hooks, and what is trained of them. Values are
    given back to the tensors of `written` alone, which are copied for that. What else there is to
    take back, `undo` does before.
    """
    before = [
        (
            module,
            type(module),
            dict(module.__dict__),
            # What these hold is changed in place; they stay the objects they are.
            {k: v.copy() for k, v in module.__dict__.items() if isinstance(v, (dict, list))},
            [(p, p.requires_grad) for p in module._parameters.values() if p is not None],
        )
        for module in dict.fromkeys(modules)
    ]
    copies = [(tensor, tensor.detach().clone()) for tensor in written]
    try:
        yield
    except BaseException:
        undo()
        for module, kind, attributes, contents, trained in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, content in contents.items():
                held = attributes[key]
                held.clear()
                held.update(content) if isinstance(held, dict) else held.extend(content)
            for parameter, flag in trained:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, value in copies:
                tensor.copy_(value)
        raise


class _NotTheModel(TokenGateError, AttributeError):
    """What a model has was asked of what is none."""


class Outcome:
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


class Skipped(Outcome, dict[str, str]):
    """What does not fit a model and was left out, and why."""

    def __init__(self, by: str, found: Mapping[str, str]) -> None:
        super().__init__(found)
        self._by = by
