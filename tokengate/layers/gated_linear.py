"""The patched layer: a frozen linear layer with a modification and a gate."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError, UnenteredContextWarning
from tokengate.gates.base import Gate
from tokengate.gates.deciding import Changed, Observer, changed, wanted
from tokengate.kernels.change import Change
from tokengate.kernels.eager import is_exported
from tokengate.kernels.factors import Factors
from tokengate.kernels.gated_sum import without_bias
from tokengate.kernels.norms import reshaped
from tokengate.kernels.recomputation import MaskMemory, is_computed_again
from tokengate.layers.calls import (
    DISABLED,
    RECORD,
    USE,
    awaits_backward,
    contexts,
    fits,
    padding_of,
    said_of,
)
from tokengate.layers.regions import Regional
from tokengate.layers.regions import inside as allowed
from tokengate.layers.several import (
    Rows,
    Told,
    counted,
    modified_by_region,
    modified_by_rows,
    whole_of,
)
from tokengate.linears.accelerate_hooks import check_resident
from tokengate.linears.class_swap import Swapped, swap, swap_back
from tokengate.linears.convolution import Patches
from tokengate.linears.linear_like import (
    LinearLike,
    as_output,
    by_position,
    inputs_of,
    is_unbatched,
    positions_of,
)
from tokengate.linears.rescaled import refuse_rescaled
from tokengate.methods.base import Modification

#: The name of what `patch` adds, and `load` where it is not told another.
DEFAULT = "default"


# What it may have from `patch` on, and so has a copy.
_PARTS = ("modification", "gate", "adapters")
_LASTING = ("_memory", "_sequence_first", "_adapters", "_in_use")


class Patched(Swapped):
    """What has modifications inside: those of all adapters of a layer, or of its slices."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        modifications = (each for each in self.modules() if isinstance(each, Modification))
        refuse_rescaled(self, name, param, modifications)  # which seldom asks for them
        super().register_parameter(name, param)


class Gated(Patched):
    """h = W0 x + S M(x) + b (eq. 2), `(..., in_features) -> (..., out_features)`.

    Never constructed: `patch` gives an existing linear layer this class and two children, so
    the object, its `weight` and its `bias` stay what and where they were.
    """

    bias: Any

    # All of its adapters by name, where it has had several; and which of them is in use where no
    # context says otherwise.
    _adapters: dict[str, Any] | None = None
    _in_use: str | None = DEFAULT

    _memory: MaskMemory
    # Whether its input is (T, B, in_features) instead of (B, T, in_features).
    _sequence_first: bool = False
    # Whether it was ever called; not kept in compiled code.
    _reached: bool = False

    @property
    def modification(self) -> Modification:
        """M of the adapter in use; None in a layer that it does not modify."""
        return self._of_adapter("modification")  # type: ignore[no-any-return]

    @property
    def gate(self) -> Gate | None:
        """Its gate S, or None where every position is modified (`gate=False`)."""
        return self._of_adapter("gate")  # type: ignore[no-any-return]

    def _of_adapter(self, part: str) -> Any:
        if part not in self._modules:  # while it is patched, which asks whether it has one
            raise AttributeError(part)
        adapter = self.adapter(self.in_use())
        return None if adapter is None else adapter[part == "gate"]

    def all_parts(self) -> list[nn.Module | None]:
        """The modules of all of its adapters."""
        return [self._modules.get(part) for part in _PARTS]

    def in_use(self) -> str | None:
        """The name of the adapter in use here; where rows have their own, of the one around."""
        names = [each for each in said_of(self, USE) if each is None or isinstance(each, str)]
        return names[-1] if names else self._in_use

    def adapter(self, name: str | None) -> tuple[Modification, Gate | None] | None:
        """The adapter of that name, None if it has none."""
        if self._adapters is None:
            own: Any = self._modules
            return (own["modification"], own["gate"]) if name == DEFAULT else None
        found = self._adapters.get(cast(str, name))
        return None if found is None else (found.modification, found.gate)

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """`(..., in_features) -> (..., out_features)`."""
        if input is None:  # by the name that its own class has for it
            input = kwargs.pop(first_parameter(self._own_class), None)  # type: ignore[arg-type]
            if input is None:
                return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        own: Any = self
        if is_unbatched(own, input):
            return self.forward(input.unsqueeze(0), *args, **kwargs).squeeze(0)
        if not torch.compiler.is_compiling() and not self._reached:
            self._reached = True
        told = self._told_of(input)
        adapter = self.adapter(told.choice) if isinstance(told.choice, str) else None
        several = isinstance(told.choice, (Rows, Regional)) and (
            not told.choice.adapters or any(map(self.adapter, told.choice.adapters))
        )
        if adapter is None and not several:
            untouched: Tensor = super().forward(input, *args, **kwargs)
            return untouched
        x, factors = input, None
        if adapter is not None and self._keeps_nothing() and not _moved(adapter[0]):
            # M(x) in factors, where that can be begun before the base layer.
            x, factors = adapter[0].factors_before(input, own)
        output: Tensor = super().forward(x, *args, **kwargs)
        out = by_position(own, output)
        mask = None if told.mask is None else self._fitting(told.mask, out)
        norms = scores = None
        observers: list[Observer] = said_of(self, RECORD)
        if observers and is_exported():
            raise TokenGateError(
                "an export was asked within tokengate.record, which counts what runs in Python: "
                "export outside of it, and record the model itself."
            )
        if adapter is not None:
            h, is_open, norms, scores = self.modified(
                input, out, mask, told.inside, *adapter, factors, *wanted(observers)
            )
        elif isinstance(told.choice, Rows):
            h, is_open = modified_by_rows(self, input, out, mask, told)
        else:
            h, is_open = modified_by_region(self, input, out, mask, told)
        if told.inside is not None:
            mask = counted(mask, told.inside)
        seen, at = h, is_open
        scores = self.samples_first(scores)
        if self._sequence_first and h.dim() == 3:
            seen, at = h.transpose(0, 1), self.samples_first(is_open)
            norms = norms and (reshaped(norms[0], Tensor.t), reshaped(norms[1], Tensor.t))
        for observer in observers:
            observer.hear(at, seen, mask, norms, scores=scores)
        if adapter is not None and adapter[1] is not None:
            adapter[1].count(scores, mask)
        return as_output(own, h, output)

    def _keeps_nothing(self) -> bool:
        """Whether its output, and the gradient that it gives its input, may be written over."""
        # Others than PyTorch's own layers may keep theirs for backward.
        return self._own_class is nn.Linear

    def modified(
        self,
        input: Tensor,
        out: Tensor,
        mask: Tensor | None,
        inside: Tensor | None,
        modification: Modification,
        gate: Gate | None,
        factors: Factors | None = None,
        wants_norms: bool = False,
        wants_scores: bool = False,
    ) -> Changed:
        """What its adapter makes of its output."""
        if _moved(modification):
            check_resident(modification)
        w = without_bias(out, self.bias) if modification.reads_w else out
        x = self.inputs(modification, input)
        real = mask if inside is None else counted(mask, inside)
        if factors is None:
            factors = modification.factors(x, w, cast(LinearLike, self))
        m = whole_of(modification, x, w) if factors is None else factors
        change = Change(out, self.bias, m, self._keeps_nothing() and inside is None)
        for observer in said_of(self, RECORD):
            if observer.change is not None:
                observer.change(change.multiplied_out())
        return changed(
            change,
            x,
            None if real is None else self.in_own_order(real, out),
            None if inside is None else self.in_own_order(inside, out),
            gate,
            wants_norms,
            wants_scores,
        )

    def inputs(self, modification: Modification, input: Tensor) -> Any:
        """x as the modification reads it, `(..., in_features)`; or `Patches`, if its maps do."""
        x = inputs_of(cast(LinearLike, self), input)
        return x.made() if isinstance(x, Patches) and modification.reads_w else x

    def _told_of(self, input: Tensor) -> Told:
        """What is said of a call with this input; computed again, what was said at first."""
        mask, elsewhere = padding_of(self, input)
        told = Told(self._in_use, mask, None, ())
        if contexts():
            for choice in said_of(self, USE):
                told.choice = choice
            if said_of(self, DISABLED):
                told.choice = None
            again = not torch.compiler.is_compiling() and is_computed_again()
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                awaits_backward(self)
            if told.choice is not None and not again:
                shape = positions_of(cast(LinearLike, self), input)
                if self._sequence_first and len(shape) == 2:
                    shape = torch.Size(shape[::-1])
                told.inside = allowed(self, shape, input, elsewhere)
                if isinstance(told.choice, Regional):
                    told.parts = told.choice.of(self, shape, input, elsewhere)
        return self._memory.settle(input, told) if self._may_recur() else told

    def _may_recur(self) -> bool:
        """Whether this forward may be one that is computed again, or that which does so."""
        return self.training or torch.is_grad_enabled() or bool(contexts())

    def in_own_order(self, mask: Tensor, out: Tensor) -> Tensor:
        """`(...)`, as the positions of `out` are, from samples first."""
        swapped = self._sequence_first and mask.dim() == 2
        return (mask.T if swapped else mask).reshape(out.shape[:-1])

    def samples_first(self, values: Tensor | None) -> Tensor | None:
        """From the order of its own positions, `(...)`, to samples first."""
        swapped = values is not None and values.dim() == 2 and self._sequence_first
        return cast(Tensor, values).T if swapped else values

    def _fitting(self, mask: Tensor, out: Tensor) -> Tensor | None:
        mask = mask.to(out.device)  # of a model over several devices
        swapped = self._sequence_first
        return mask if (out.shape[:-1] == mask.T.shape if swapped else fits(mask, out)) else None

    def _kept_by_copies(self, state: Any) -> Any:
        kinds = [kind for kind in (USE, DISABLED) if said_of(self, kind)]
        if kinds:
            warnings.warn(
                f"a patched layer was copied or pickled within tokengate.{kinds[-1]}, which its "
                "copy is not in: call tokengate.unpatch(copy) for the base model, or "
                "tokengate.use(copy, name) for another adapter.",
                UnenteredContextWarning,
                stacklevel=2,
            )
        # A class's own __getstate__ may give something else than its attributes.
        return {**state, "_reached": False} if isinstance(state, dict) else state

    def _replicate_for_data_parallel(self) -> Any:
        # Its replicas run in threads of their own, which are in no context.
        kinds = sorted({context.kind for context in contexts() if self in context.layers})
        if kinds:
            raise TokenGateError(
                f"DataParallel was called within {' and '.join(kinds)}, which its threads are not "
                "in: call the model itself, or use DistributedDataParallel."
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]


class GatedLinear(Gated, nn.Linear):
    """What an `nn.Linear` becomes; other kinds of linear layers become a class made for them."""

    _own_class = nn.Linear


def _moved(modification: Modification) -> bool:
    """Whether Accelerate moves it: then hooks of its own run."""
    return "_hf_hook" in modification.__dict__


@functools.cache
def first_parameter(kind: type[nn.Module]) -> str:
    """How a layer's own class calls its input."""
    return list(inspect.signature(kind.forward).parameters)[1]


def attach(
    layer: LinearLike,
    modification: Modification,
    gate: Gate | None,
    kind: type[Gated] | None = None,
) -> None:
    """Turn `layer` itself into a gated one, of a `kind` that is written for it or a common one."""
    swap(layer, kind or (GatedLinear if isinstance(layer, nn.Linear) else Gated))
    layer.register_module("modification", modification.train(layer.training))
    layer.register_module("gate", None if gate is None else gate.train(layer.training))
    layer.__dict__ |= {"_reached": False, "_memory": MaskMemory()}


def detach(layer: Gated) -> None:
    """Turn `layer` back into what it was."""
    for name in _PARTS:
        layer._modules.pop(name, None)
    for name in ("_reached", *_LASTING):
        layer.__dict__.pop(name, None)
    swap_back(layer)
