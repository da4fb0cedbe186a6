"""What a model was called with in the last steps of a training, to be called with it again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.kernels.recomputation import is_learnt_from
from tokengate.layers.calls import RECORD, Context, contexts
from tokengate.layers.following import HEARERS

# The calls of so many of the last steps are kept at most, and of no more than have so many samples,
# or bytes of inputs; but always of the least number.
STEPS, LEAST = 128, 8
_SAMPLES, _BYTES = 512, 2**26


@dataclass(eq=False)
class _Call:
    """One that gradients could come back through.

    Attributes:
        module: what was called, by its name in the model.
        given: copies of its arguments by position and by keyword.
        autocast: the dtype of an autocast around it, or None.
        around: the contexts around it; None for whichever there will be.
    """

    module: str
    given: tuple[tuple[Any, ...], dict[str, Any]]
    autocast: torch.dtype | None
    around: tuple[Context, ...] | None


class LastCalls:
    """The last calls of the steps that were taken, from `begin` on.

    Arguments are copied, since loops write the next batch into the same memory. Nothing is known
    any more once a call has others than tensors without gradients, numbers and strings, in lists,
    tuples and dicts, as a cache is: what is left would be of one kind.

    Args:
        model: whose modules' calls from outside these are.
        device_type: whose autocast they are within.
    """

    def __init__(self, model: nn.Module, device_type: str) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._device_type = device_type
        self._steps: deque[list[_Call]] = deque()
        self._now: list[_Call] = []
        self._lacks = False

    def begin(self) -> None:
        """Keep those from here on."""
        HEARERS.add(self)

    def end(self) -> None:
        """Keep none, and forget all."""
        HEARERS.discard(self)
        self._steps.clear()
        self._now = []

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One is about to begin."""
        if module not in self._names or self._lacks or not is_learnt_from():
            return
        try:
            given = _copied(args), _copied(kwargs)
        except TypeError:
            self._lacks = True
            return
        is_on = torch.is_autocast_enabled(self._device_type)
        dtype = torch.get_autocast_dtype(self._device_type) if is_on else None
        self._now.append(_Call(self._names[module], given, dtype, _around()))

    def forget(self) -> None:
        """Those since the last step, which is not taken."""
        self._now = []

    def step(self) -> None:
        """A step is taken with them; leave those out that are not among the last any more."""
        self._steps.append(self._now)
        self._now = []
        sizes = [_size(calls) for calls in self._steps]
        samples, held = (sum(each) for each in zip(*sizes, strict=True))
        for own_samples, own_bytes in sizes:
            samples -= own_samples
            enough = samples >= _SAMPLES or held > _BYTES or len(self._steps) > STEPS
            if len(self._steps) <= LEAST or not enough:
                break
            held -= own_bytes
            self._steps.popleft()

    def again(self) -> list[list[Callable[[], Any]]]:
        """What makes those of each step once more, from the first on; none if not all is known.

        Or if contexts were around one that are no more.
        """
        here = _around()
        if self._lacks or any(c.around not in (None, here) for own in self._steps for c in own):
            return []
        return [[self._maker(call) for call in calls] for calls in self._steps]

    def _maker(self, call: _Call) -> Callable[[], Any]:
        args, kwargs = call.given
        on = call.autocast is not None

        def make() -> Any:
            with torch.autocast(self._device_type, call.autocast, enabled=on):
                return self._modules[call.module](*args, **kwargs)

        return make

    def state_dict(self) -> dict[str, Any]:
        """All of it, but for the contexts."""
        steps = [[(c.module, *c.given, c.autocast) for c in calls] for calls in self._steps]
        return {"steps": steps, "lacks": self._lacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the contexts are those that there are."""
        self._lacks = bool(state["lacks"])
        self._now = []
        self._steps = deque(
            [_Call(name, (args, kwargs), dtype, None) for name, args, kwargs, dtype in calls]
            for calls in state["steps"]
        )


def _around() -> tuple[Context, ...]:
    """The contexts that hold here and say what layers do."""
    return tuple(context for context in contexts() if context.kind != RECORD)


def _size(calls: list[_Call]) -> tuple[int, int]:
    """The samples in these, and the bytes of their inputs."""
    tensors = [list(_tensors(call.given)) for call in calls]
    samples = [next((len(t) for t in own if t.dim()), 1) for own in tensors]
    return sum(samples), sum(t.numel() * t.element_size() for own in tensors for t in own)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.requires_grad or type(value) is not Tensor or value.layout != torch.strided:
            raise TypeError
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, (list, tuple, dict)):
        for part in parts:
            yield from _tensors(part)
