"""What belongs to a call and not to a model: the contexts around it, and the modules that run.

Contexts (`use`, `disabled`, `restrict`, `record`) are in a context variable, so that each thread
and each asyncio task has its own; modules that run are each thread's. Layers ask here.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
OPEN: dict[int, Context] = {}


def enter(kind: str, layers: Mapping[Any, Any], owner: object, *, windows: bool = False) -> Context:
    """From here on, in this thread and task, this holds of these layers."""
    context = Context(kind, layers, owner, threading.get_ident(), windows)
    OPEN[id(context)] = context
    _CONTEXTS.set((*_holding(_CONTEXTS.get()), context))
    return context


def _holding(contexts: tuple[Context, ...]) -> Iterator[Context]:
    """Those that still say something: a chain of tasks, each begun in the last, would pile up."""
    left = [c for c in contexts if c.kind in (USE, DISABLED) and id(c) not in OPEN]
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
        c for c in list(OPEN.values()) if c.owner is owner
    ]
    if not own:
        return None
    last = own[-1]
    last.ended = last.kind == RECORD or last not in contexts
    OPEN.pop(id(last), None)
    _CONTEXTS.set(tuple(c for c in contexts if c is not last and not c.ended))
    return last


@contextlib.contextmanager
def in_context(kind: str, layers: Mapping[Any, Any], *, windows: bool = False) -> Iterator[None]:
    """The two in one."""
    owner = object()
    enter(kind, layers, owner, windows=windows)
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
    holding = (c for c in _CONTEXTS.get() if c.kind == kind and layer in c.layers)
    return [c.layers[layer] for c in holding if not c.ended]


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
        length: how many positions it was given of its own, T; None where that is not known.
        others: what it was given to attend to beside them, as cross-attention makes k and v of, or
            what is joined to them; each with its padding mask, `(B, L)`, or None.
        decodes: whether it was given what an encoder has made, of which it may have several beams.
        window: which part of its sequences it is about, if it received some.
    """

    module: nn.Module
    inside: Collection[nn.Module] = ()
    exactly: bool = False
    tells: bool = False
    mask: Tensor | None = None
    inferred: bool = False
    length: int | None = None
    others: Sequence[tuple[Tensor, Tensor | None]] = ()
    decodes: bool = False
    window: Window | None = None

    def is_about(self, layer: nn.Module) -> bool:
        """Whether what it says is about this layer."""
        if layer in self.inside:
            return True
        return not self.exactly and any(module is layer for module in self.module.modules())

    def apart(self, layer: nn.Module, input: Tensor) -> Tensor | None:
        """The mask of the others whose positions those of `input` must be, to go by their number.

        Where the others are as many as its own they cannot be told apart so.
        """
        if self.length is None or getattr(layer, "_sequence_first", False):
            return None
        for states, mask in self.others:
            if mask is not None and states.shape[1] != self.length and fits(mask, input):
                return mask
        return None


# The attribute of a tensor that has one of these.
LEFT = "_tokengate_left"


@dataclass(eq=False)
class Left:
    """What is on the output of a module for what is called with it by hand, as a head may be."""

    mask: Tensor | None
    window: Window | None

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # a tensor that is saved or copied has nothing of it

    def is_of(self, tensor: Tensor) -> bool:
        """Whether these are its positions, `(B, T, ...)`."""
        if self.mask is not None:
            return tensor.shape[:2] == self.mask.shape
        ids = None if self.window is None else self.window.ids
        return ids is not None and tensor.shape[:2] == ids.shape


def fits(mask: Tensor, input: Tensor) -> bool:
    """Whether a mask `(B, T)` can be of a layer's input, `(B, T, ...)` or `(B T, ...)`."""
    return len(input) == mask.numel() if input.dim() == 2 else input.shape[:-1] == mask.shape


class _Thread(threading.local):
    def __init__(self) -> None:
        self.running: list[Running] = []
        self.telling: list[Running] = []  # those that say which positions are whose


_THREAD = _Thread()
# Of all threads that run a module of a patched model, outside of compiled code.
RUNNING: dict[int, list[Running]] = {}


def running() -> Sequence[Running]:
    """The modules whose forwards run in this thread, the outermost first."""
    return _THREAD.running


def begin(call: Running) -> None:
    """A forward begins."""
    _THREAD.running.append(call)
    if call.tells or call.others:
        _THREAD.telling.append(call)
    if len(_THREAD.running) == 1 and not torch.compiler.is_compiling():
        RUNNING[threading.get_ident()] = _THREAD.running


def end(call: Running) -> None:
    """It ends, if it has begun."""
    for calls in (_THREAD.running, _THREAD.telling):
        if calls and calls[-1] is call:
            calls.pop()
    if not _THREAD.running and not torch.compiler.is_compiling():
        RUNNING.pop(threading.get_ident(), None)


def same(input: Tensor, states: Tensor) -> bool:
    """Whether an input is these states, or all of them as a view of another shape."""
    if input is states or torch.compiler.is_compiling() or input._base is None:
        return input is states
    if input._base is not states and input._base is not states._base:
        return False
    if input.numel() != states.numel() or not (input.is_contiguous() and states.is_contiguous()):
        return False
    return bool(input.storage_offset() == states.storage_offset())


def left_on(states: Tensor | None) -> Left | None:
    """What a module that has ended says of its output, where none that runs says anything."""
    if states is None or any(call.tells for call in _THREAD.telling):
        return None
    left = getattr(states, LEFT, None)
    if left is None and not torch.compiler.is_compiling() and states._base is not None:
        left = getattr(states._base, LEFT, None) if same(states, states._base) else None
    return left if isinstance(left, Left) else None


def window_around(states: Tensor | None = None) -> Window | None:
    """That of the innermost module that received sequences, or None; `states` is what runs."""
    found = next((c.window for c in reversed(_THREAD.running) if c.window is not None), None)
    left = left_on(states) if found is None else None
    return found if left is None else left.window


def in_decoder() -> bool:
    """Whether a module runs that was given what an encoder has made."""
    return any(call.decodes for call in _THREAD.running)


def padding_of(layer: nn.Module, input: Tensor) -> tuple[Tensor | None, bool]:
    """The padding mask of a layer's positions, `(B, T)`, and whether its input is the others."""
    for call in _THREAD.telling:  # the outermost first: those inside are not given their mask
        for states, mask in call.others:
            if same(input, states) and call.is_about(layer):
                return mask, True
    guess = None
    for call in reversed(_THREAD.telling):
        if not call.is_about(layer):
            continue
        if (of_others := call.apart(layer, input)) is not None:
            return of_others, True
        if call.tells and not call.inferred:
            return (guess if call.mask is None else call.mask), False
        if call.tells and call.mask is not None:
            # What a module around says in two dimensions is made into four inside of it.
            guess = call.mask
    left = left_on(input)
    return (guess if left is None else left.mask), False
