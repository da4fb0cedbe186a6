"""What a model was called with in the last steps of a training, to be called with it again."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.kernels.recomputation import is_learnt_from
from tokengate.layers.calls import RECORD, RESTRICT, Context, contexts, running
from tokengate.layers.following import HEARERS
from tokengate.layers.restriction import Said, kept, said_again
from tokengate.names import inside, named_modules

# The calls of so many of the last steps are kept at most, and of no more than have so many samples,
# or bytes of inputs and masks; but always of the least number, or none if these have more than may
# be held.
STEPS, LEAST = 128, 8
_SAMPLES, _BYTES, _MOST = 512, 2**26, 2**28


@dataclass(eq=False)
class _Call:
    """One that gradients could come back through.

    Attributes:
        module: what was called, by its name in the model.
        given: copies of its arguments by position and by keyword.
        autocast: the dtype of an autocast around it, or None.
        around: the contexts around it, and what is said again of each that has ended by then; None
            if that can't be.
        forward: what others had put in the place of the module's, as Lightning on several devices
            does for the time of a call, to have its training step called.
        resumed: whether it is of a training before this one; then what is around it, and the
            forward, are whichever there will be.
    """

    module: str
    given: tuple[tuple[Any, ...], dict[str, Any]]
    autocast: torch.dtype | None
    around: dict[Context, Said | None]
    forward: Any = None
    resumed: bool = False

    @cached_property
    def samples(self) -> int:
        return next((len(t) for t in _tensors(self.given) if t.dim()), 1)

    @cached_property
    def bytes(self) -> int:
        said = (each for each in self.around.values() if each)
        masks = {region.where for each in said for _, region in each.values()}
        return sum(t.nbytes for t in _tensors([self.given, *masks]))


class LastCalls:
    """The last calls of the steps that were taken, from `begin` on.

    Arguments are copied, since loops write the next batch into the same memory. Nothing is known
    any more once a call has others than tensors without gradients, numbers and strings, in lists,
    tuples and dicts, as a cache is, or there is no room: what is left would be of one kind.

    Args:
        model: whose modules' calls from outside these are.
        device: where it is, by whose autocast.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._modules = dict(named_modules(model))
        self._names = {module: name for name, module in self._modules.items()}
        self._device = device
        self._steps: deque[list[_Call]] = deque()
        self._now: list[_Call] = []
        self._lacks = False
        # On what is compiled; and whether that was sought because nothing was heard.
        self._hooks: list[Any] = []
        self._sought = False
        # Whether a call runs of what is compiled.
        self._within = False

    def begin(self) -> None:
        """Keep those from here on."""
        if not self._lacks and self not in HEARERS:
            HEARERS.add(self)
            self._seek_compiled()

    def end(self) -> None:
        """Keep none, and forget all."""
        HEARERS.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._within = [], False
        self._steps.clear()
        self._now = []

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One is about to begin."""
        if self._within or module not in self._names or not is_learnt_from():
            return
        kind = self._device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        try:
            given = _each(_copied, (args, kwargs))
            around = {c: kept(c) if c.kind == RESTRICT else None for c in self._holding()}
        except (TypeError, RuntimeError):  # of what is no plain tensor, or memory
            self._lacks = True
        else:
            forward = vars(module).get("forward")
            self._now.append(_Call(self._names[module], given, dtype, around, forward))
            held = sum(call.bytes for calls in (*self._steps, self._now) for call in calls)
            self._lacks = held > _MOST
        if self._lacks:
            self.end()

    def forget(self) -> None:
        """Those since the last step, which is not taken."""
        self._now = []

    def step(self) -> None:
        """A step is taken with them; leave those out that are not among the last any more."""
        if not self._now:
            if self in HEARERS and not self._hooks and not self._sought:  # compiled since
                self._sought = True
                self._seek_compiled()
            return
        self._steps.append(self._now)
        self._now = []
        sizes = [
            (sum(c.samples for c in calls), sum(c.bytes for c in calls)) for calls in self._steps
        ]
        samples, held = (sum(each) for each in zip(*sizes, strict=True))
        for own_samples, own_bytes in sizes:
            samples -= own_samples
            enough = samples >= _SAMPLES or held > _BYTES or len(self._steps) > STEPS
            if len(self._steps) <= LEAST or not enough:
                break
            held -= own_bytes
            self._steps.popleft()

    def _seek_compiled(self) -> None:
        """Hear what `torch.compile` has returned for one of these modules, too.

        It calls that within code that can tell nobody, and no module knows what was made of it.
        Where that is not compiled after all, as beyond dynamo's limit, its module would tell again.
        """
        from torch._dynamo import OptimizedModule  # which `import torch` leaves out

        for each in gc.get_objects():
            if type(each) is OptimizedModule and inside(each) in self._names:
                self._hooks += [
                    each.register_forward_pre_hook(self._call_begins, with_kwargs=True),
                    each.register_forward_hook(self._call_ends, always_call=True),
                ]

    def _call_begins(
        self, compiled: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not torch.compiler.is_compiling() and not running():
            self.hear(inside(compiled), args, kwargs)
            self._within = self in HEARERS

    def _call_ends(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and not running():
            self._within = False

    def again(self) -> list[list[Callable[[], Any]]]:
        """What makes those of each step once more, from the first on; none if not all is known.

        Or if contexts were around one that have ended and can't be entered again, or hold now and
        were not, or its module has another forward.
        """
        if self._lacks or not all(self._is_as_it_was(c) for calls in self._steps for c in calls):
            return []
        return [[self._maker(call) for call in calls] for calls in self._steps]

    def _holding(self) -> tuple[Context, ...]:
        """The contexts that hold here, and say what layers of this model do."""
        said = (context for context in contexts() if context.kind != RECORD)
        return tuple(c for c in said if not self._names.keys().isdisjoint(c.layers))

    def _is_as_it_was(self, call: _Call) -> bool:
        holding = self._holding()
        before = call.resumed or (
            vars(self._modules[call.module]).get("forward") == call.forward
            and call.around.keys() >= set(holding)
        )
        return before and all(
            said is not None or context in holding for context, said in call.around.items()
        )

    def _maker(self, call: _Call) -> Callable[[], Any]:
        on = call.autocast is not None

        def make() -> Any:
            # A call may change what it is given, and is not the last.
            args, kwargs = _each(_copied, call.given)
            holding = self._holding()
            ended = [s for context, s in call.around.items() if s and context not in holding]
            # What an autocast around the step has cast is of before it.
            autocast = torch.autocast(
                self._device.type, call.autocast, enabled=on, cache_enabled=False
            )
            with ExitStack() as stack, autocast:
                for said in ended:
                    stack.enter_context(said_again(said))
                return self._modules[call.module](*args, **kwargs)

        return make

    def state_dict(self) -> dict[str, Any]:
        """All of it, but for what is around calls, and calls in contexts that have ended."""
        holding = self._holding()
        steps = [
            [(c.module, *c.given, c.autocast, self._are_here(c)) for c in calls]
            for calls in self._steps
            if all(context in holding for call in calls for context in call.around)
        ]
        return {"steps": steps, "lacks": self._lacks}

    def _are_here(self, call: _Call) -> list[bool]:
        """Which tensors are where the model is, wherever somebody will load them to."""
        return [t.device.type == self._device.type for t in _tensors(call.given)]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; what is around calls is what there will be."""
        self._lacks = bool(state["lacks"])
        self._now = []
        self._steps = deque([self._loaded(*call) for call in calls] for calls in state["steps"])

    def _loaded(
        self, module: str, args: Any, kwargs: Any, autocast: torch.dtype | None, here: list[bool]
    ) -> _Call:
        are_here = iter(here)

        def placed(value: Any) -> Any:
            moves = isinstance(value, Tensor) and next(are_here)
            return value.to(self._device) if moves else value

        return _Call(module, _each(placed, (args, kwargs)), autocast, {}, resumed=True)


def _each(do: Callable[[Any], Any], value: Any) -> Any:
    """The same lists, tuples and dicts of what `do` makes of what is in them, one by one."""
    if type(value) in (list, tuple):
        return type(value)([_each(do, part) for part in value])
    if type(value) is dict:
        return {key: _each(do, part) for key, part in value.items()}
    return do(value)


def _copied(value: Any) -> Any:
    if type(value) is Tensor and not value.requires_grad and value.layout == torch.strided:
        return value.clone()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError


def _tensors(value: Any) -> list[Tensor]:
    """Those in it, in the order of `_each`."""
    found: list[Tensor] = []
    _each(lambda part: found.append(part) if isinstance(part, Tensor) else None, value)
    return found
