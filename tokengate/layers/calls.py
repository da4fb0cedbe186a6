"""What belongs to a call and not to a model: the contexts around it, and the modules that run.

Contexts (`use`, `disabled`, `restrict`, `record`) are in a context variable, so that each thread
and each asyncio task has its own; modules that run are each thread's. Layers ask here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError

_Function = TypeVar("_Function", bound=Callable[..., Any])

USE, DISABLED, RESTRICT, RECORD = "use", "disabled", "restrict", "record"


@dataclass(eq=False)
class Context:
    """One that was entered.

    Attributes:
        kind: `USE`, `DISABLED`, `RESTRICT` or `RECORD`.
        layers: the layers it is about, and what it says of each.
        owner: whoever entered it, and leaves it.
        thread: that it belongs to.
        windows: whether its layers ask which part of its sequences a call is about.
        derived: whether a layer ran in it whose backward may come after it.
        ended: whether it holds for nobody any more.
    """

    kind: str
    layers: Mapping[Any, Any]
    owner: object
    thread: int
    windows: bool = False
    derived: bool = False
    ended: bool = False


# Those that are in force, from the first entered on.
_CONTEXTS: ContextVar[tuple[Context, ...]] = ContextVar("tokengate_contexts", default=())
# Of all threads and tasks.
_OPEN: dict[int, Context] = {}


def enter(kind: str, layers: Mapping[Any, Any], owner: object, *, windows: bool = False) -> Context:
    """From here on, in this thread and task, this holds of these layers."""
    context = Context(kind, layers, owner, threading.get_ident(), windows)
    _OPEN[id(context)] = context
    _CONTEXTS.set((*_holding(_CONTEXTS.get()), context))
    return context


def _holding(contexts: tuple[Context, ...]) -> Iterator[Context]:
    """Those that still say something: a chain of tasks, each begun in the last, would pile up."""
    left = [c for c in contexts if c.kind in (USE, DISABLED) and id(c) not in _OPEN]
    for context in contexts:
        later = left[left.index(context) + 1 :] if context in left else []
        hidden = any(
            other.kind == context.kind and context.layers.keys() <= other.layers.keys()
            for other in later
        )
        if not (context.ended or hidden):
            yield context


def leave(owner: object) -> Context | None:
    """What `owner` entered last holds no longer; others do, in whatever order they end.

    Tasks that were begun within it go on in it. But a recording has an end; and so has what is left
    elsewhere than where it was entered, as by a generator that another thread closes.
    """
    contexts = _CONTEXTS.get()
    own = [c for c in contexts if c.owner is owner] or [
        c for c in list(_OPEN.values()) if c.owner is owner
    ]
    if not own:
        return None
    last = own[-1]
    last.ended = last.kind == RECORD or last not in contexts
    _OPEN.pop(id(last), None)
    _CONTEXTS.set(tuple(c for c in contexts if c is not last and not c.ended))
    return last


@contextlib.contextmanager
def in_context(kind: str, layers: Mapping[Any, Any]) -> Iterator[None]:
    """The two in one."""
    owner = object()
    enter(kind, layers, owner)
    try:
        yield
    finally:
        leave(owner)


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Within this context no recording is told anything."""
    before = _CONTEXTS.set(tuple(c for c in _CONTEXTS.get() if c.kind != RECORD))
    try:
        yield
    finally:
        _CONTEXTS.reset(before)


def contexts() -> tuple[Context, ...]:
    """Those that are in force here, from the first entered on."""
    return _CONTEXTS.get()


def awaits_backward(layer: nn.Module) -> None:
    """The contexts that say which adapter of a layer to use may be left before its backward."""
    for context in _CONTEXTS.get():
        if context.kind == USE and layer in context.layers:
            context.derived = True


def said_of(layer: nn.Module, kind: str) -> list[Any]:
    """What the contexts of this kind say of a layer, from the first entered on."""
    contexts = (c for c in _CONTEXTS.get() if c.kind == kind and not c.ended)
    return [c.layers[layer] for c in contexts if layer in c.layers]


@dataclass(eq=False)
class Window:
    """Which part of its sequences a call is about: with a cache, only what comes after it.

    Attributes:
        start: the first of these positions.
        length: how many they are.
        ids: the tokens there, `(B, length)`.
        cached: whether more may follow, in calls that go on from a cache.
        cache: the cache itself, by which such calls are known.
        real: the padding mask of all positions so far, `(B, start + length)`, or None.
        memo: what was found out about them, once for all layers.
    """

    start: int
    length: int | None = None
    ids: Tensor | None = None
    cached: bool = False
    cache: Any = None
    real: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Running:
    """A module whose forward runs.

    Attributes:
        module: it.
        inside: the layers that what it says is about.
        exactly: whether it is about no others that the module may have been given since.
        tells: whether it says anything of padding.
        mask: of the positions of its call, `(B, T)`; None where none is padding.
        inferred: whether that mask was inferred from who attends to whom.
        others: in cross-attention, what k and v are made of.
        others_mask: the padding mask of these.
        decodes: whether it was given what an encoder has made, of which it may have several beams.
        window: which part of its sequences it is about, if it received some.
    """

    module: nn.Module
    inside: Collection[nn.Module] = ()
    exactly: bool = False
    tells: bool = False
    mask: Tensor | None = None
    inferred: bool = False
    others: Tensor | None = None
    others_mask: Tensor | None = None
    decodes: bool = False
    window: Window | None = None

    def is_about(self, layer: nn.Module) -> bool:
        """Whether what it says is about this layer."""
        if layer in self.inside:
            return True
        return not self.exactly and any(module is layer for module in self.module.modules())


class _Thread(threading.local):
    def __init__(self) -> None:
        self.running: list[Running] = []


_THREAD = _Thread()
# Of all threads that run a module of a patched model, outside of compiled code.
_RUNNING: dict[int, list[Running]] = {}


def begin(call: Running) -> None:
    """A forward begins."""
    running = _THREAD.running
    if running and running[0].module is call.module and not _calls_itself(call.module):
        running.clear()  # what an interruption has left there
    running.append(call)
    if len(running) == 1 and not torch.compiler.is_compiling():
        _RUNNING[threading.get_ident()] = running


def _calls_itself(module: nn.Module) -> bool:
    """Whether a forward of `module`, of which one begins, runs already around it."""
    if torch.compiler.is_compiling():
        return True
    count, frame = 0, sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count > 1


def end(module: nn.Module) -> None:
    """It ends."""
    running = _THREAD.running
    if running and running[-1].module is module:
        running.pop()
    if not running and not torch.compiler.is_compiling():
        _RUNNING.pop(threading.get_ident(), None)


def current_window() -> Window | None:
    """That of the innermost module that received sequences, or None."""
    return next((c.window for c in reversed(_THREAD.running) if c.window is not None), None)


def in_decoder() -> bool:
    """Whether a module runs that was given what an encoder has made."""
    return any(call.decodes for call in _THREAD.running)


def padding_of(layer: nn.Module, input: Tensor) -> tuple[Tensor | None, bool]:
    """The padding mask of a layer's positions, `(B, T)`, and whether its input is the others."""
    mask, guess = None, None
    for call in _THREAD.running:  # the outermost first: those inside are not given their mask
        if call.others is input and call.is_about(layer):
            return call.others_mask, True
    for call in reversed(_THREAD.running):
        if call.tells and call.is_about(layer):
            if not call.inferred:
                mask = call.mask
                break
            # What a module around says in two dimensions is made into four inside of it.
            guess = call.mask
    return (guess if mask is None else mask), False


_CHANGING = threading.RLock()


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
        yield


def exclusive(function: _Function) -> _Function:
    """For what changes what a `model` has: its whole call is within `changing`."""

    @functools.wraps(function)
    def alone(model: Any, *args: Any, **kwargs: Any) -> Any:
        with changing(model, function.__name__):
            return function(model, *args, **kwargs)

    return cast(_Function, alone)


def busy_elsewhere(model: nn.Module) -> str | None:
    """What another thread does with the model at this time; None if there is none."""
    if not _OPEN and not _RUNNING:
        return None
    here, modules = threading.get_ident(), set(model.modules())
    alive = {thread.ident for thread in threading.enumerate()} - {here}
    for thread, running in list(_RUNNING.items()):
        if thread in alive and any(call.module in modules for call in list(running)):
            return "runs it"
    for context in list(_OPEN.values()):
        if context.thread in alive and not modules.isdisjoint(context.layers):
            return f"is in {context.kind}"
    return None
