"""The modules around patched layers, which tell them what their forwards are called with.

A module that is followed has a class of its own kind whose `forward` begins a call and ends it, so
that whoever calls `module(...)`, `module.forward(...)`, a module inside of it or a method that does
so, as `encode_image`, is seen alike; hooks would see the first of these alone.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from tokengate.errors import UnenteredContextWarning
from tokengate.kernels.recomputation import is_in_hook
from tokengate.layers.calls import (
    LEFT,
    OPEN,
    RECORD,
    Context,
    Left,
    Running,
    begin,
    contexts,
    end,
    in_context,
    running,
)
from tokengate.layers.coverage import report_lost_of, report_unreached
from tokengate.layers.experts.owner import Experts
from tokengate.layers.gated_linear import Gated
from tokengate.layers.padding import Signature, signature_of, what_is_said
from tokengate.layers.patched import SEEN
from tokengate.layers.sliced_linear import Sliced
from tokengate.linears.by_name import class_names
from tokengate.linears.class_swap import Swapped, swap, swap_back

_FOLLOWED = "_tokengate_followed"

# Those that are told, by their `hear`, what followed modules are called with from outside. What
# `torch.compile` has returned for one is no such module, and calls none from outside.
HEARERS: WeakSet[Any] = WeakSet()

# Of each module, the contexts around its last call from outside without gradients, by their kind.
_AROUND: WeakKeyDictionary[nn.Module, list[tuple[str, ref[Context]]]] = WeakKeyDictionary()

# Modules of transformers that call all layers inside of them sequence-first; found by running them.
_TRANSPOSING = tuple(
    f"transformers.models.{name}"
    for name in (
        "xlnet.modeling_xlnet.XLNetModel",
        "fsmt.modeling_fsmt.EncoderLayer",
        "fsmt.modeling_fsmt.DecoderLayer",
        "longformer.modeling_longformer.LongformerSelfAttention",
        "led.modeling_led.LEDEncoderSelfAttention",
    )
)


@dataclass
class _Followed:
    """What is kept on a module while it is followed."""

    signature: Signature
    inside: frozenset[nn.Module]  # the patched layers in it
    partial: bool = False  # whether others of its model are outside of it


class Followed(Swapped):
    """A module around patched layers, under the name of its own class and with its signature."""

    @classmethod
    def _members_for(cls, own_class: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(own_class.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _told(self, functools.partial(own_class.forward, self), args, kwargs)

        @functools.wraps(own_class.__call__)
        def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and HEARERS and not running():
                for hearer in list(HEARERS):
                    hearer.hear(self, args, kwargs)
            return own_class.__call__(self, *args, **kwargs)

        def _call_impl(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Not of `super()`: what `module.compile()` has made of it stays after `unfollow`.
            call = functools.partial(own_class._call_impl, self)
            if "forward" in self.__dict__:  # others have put theirs before that of the class
                return _told(self, call, args, kwargs)
            return call(*args, **kwargs)

        same = ("__name__", "__qualname__", "__module__", "__doc__")
        members = {name: getattr(own_class, name) for name in same}
        return {"forward": forward, "_call_impl": _call_impl, "__call__": __call__, **members}


def _told(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `forward` returns, while the layers inside know what it was called with."""
    followed: _Followed | None = module.__dict__.get(_FOLLOWED)
    if followed is None:  # made of the class of one that is
        return forward(*args, **kwargs)
    if not torch.compiler.is_compiling():
        if _was_interrupted(module):
            while running():
                end(running()[-1])
        missing = [] if running() else _missing(module, followed.inside)
        if missing:
            with contextlib.ExitStack() as stack:
                for each in missing:
                    stack.enter_context(in_context(each.kind, each.layers, windows=each.windows))
                return _told(module, forward, args, kwargs)
    outermost = not running()
    if outermost:
        report_lost_of(module, stacklevel=8)
    call = what_is_said(module, followed.inside, followed.signature, args, kwargs)
    if torch.compiler.is_dynamo_compiling():  # which can break its graph in no `try`
        begin(call)
        output = forward(*args, **kwargs)
        end(call)
    else:
        try:
            begin(call)
            output = forward(*args, **kwargs)
        finally:
            end(call)
    if outermost:
        report_unreached(module)
    if followed.partial and not any(around.tells for around in running()):
        _leave_behind(call, output)
    return output


def _missing(module: nn.Module, inside: frozenset[nn.Module]) -> Sequence[Context]:
    """The contexts that a call in a hook of backward is not in, and the forward before it was.

    It computes the same again, and may do so in another thread, that of its device. Those that are
    about no layer `inside` of the module are another model's.
    """
    here = [context for context in contexts() if not inside.isdisjoint(context.layers)]
    if not is_in_hook():
        found = [] if torch.is_grad_enabled() else [(c.kind, ref(c)) for c in here]
        if found or module in _AROUND:
            _AROUND[module] = found
        return ()
    around = _AROUND.get(module, ())
    fewer = Counter(kind for kind, _ in around) - Counter(context.kind for context in here)
    before = [(kind, c()) for kind, c in around if kind in fewer and c() not in here]
    held = [c for _, c in before if c is not None and OPEN.get(id(c)) is c]
    left = [kind for kind, c in before if c not in held and kind != RECORD]
    if left:
        warnings.warn(
            f"this {type(module).__name__} was called in a hook of backward, as by a loss that "
            f"embeds again (GradCache, sentence-transformers' Cached...), and tokengate.{left[0]}, "
            "which its last forward without gradients was in, has ended: if that was the loss's, "
            "call backward within the same block.",
            UnenteredContextWarning,
            stacklevel=2,
        )
    return held


def _was_interrupted(module: nn.Module) -> bool:
    """Whether an exception has left calls behind, which compiled code ends in no `finally`.

    A forward of the outermost module begins, then, that runs nowhere around.
    """
    if not running() or running()[0].module is not module:
        return False
    frame, count = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code.co_name == _told.__name__ and frame.f_locals.get("module") is module:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count < 2


def _leave_behind(call: Running, output: Any) -> None:
    """Tell what is called with the output, by hand or by a module around, as a head is."""
    left = Left(call.mask, call.window)
    for tensor in _tensors(output):
        if left.is_of(tensor):
            setattr(tensor, LEFT, left)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, (Mapping, list, tuple)):
        for part in parts:
            yield from _tensors(part)


def follow(model: nn.Module) -> None:
    """Let what `model` is called with reach the gates in it, wherever its forwards are entered."""
    _mark_sequence_first(model)
    layers = frozenset(_patched(model))
    for module in _holders(model):
        if not isinstance(module, Followed):
            swap(module, Followed)
        if _FOLLOWED not in module.__dict__:
            followed = _Followed(signature_of(module), frozenset())
            module.__dict__ |= {_FOLLOWED: followed, SEEN: False}
        followed = module.__dict__[_FOLLOWED]
        followed.inside = frozenset(_patched(module))
        followed.partial |= followed.inside != layers


def unfollow(model: nn.Module) -> None:
    """Take back what `follow` did, from modules that hold no patched layer any more."""
    holders = set(_holders(model))
    for module in model.modules():
        # What is patched itself after it was followed has the class of that on top.
        above = isinstance(module, Experts)
        if isinstance(module, Followed) and module not in holders and not above:
            for key in (_FOLLOWED, SEEN):
                module.__dict__.pop(key, None)
            swap_back(module)


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules around the patched layers that have a forward."""
    return [
        module
        for module in model.modules()
        if not isinstance(module, (Gated, Sliced, Experts))
        and ("forward" in module.__dict__ or type(module).forward is not nn.Module.forward)
        and next(_patched(module), None) is not None
    ]


def _patched(module: nn.Module) -> Iterator[Gated]:
    return (m for m in module.modules() if isinstance(m, Gated))


def _mark_sequence_first(model: nn.Module) -> None:
    """Tell the patched layers in `model` that are sequence-first."""
    for owner in model.modules():
        # With those inside of it: the patched slices of a fused layer.
        for layer in (inside for module in _sequence_first(owner) for inside in module.modules()):
            if isinstance(layer, Gated):
                layer._sequence_first = True


def _sequence_first(owner: nn.Module) -> list[nn.Module]:
    if isinstance(owner, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        # Not those of its attention, which sees to it itself.
        return [] if owner.self_attn.batch_first else [owner.linear1, owner.linear2]
    return [owner] if any(name in _TRANSPOSING for name in class_names(owner)) else []
