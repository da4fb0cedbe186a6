"""What a gate is: a_i of h_i = w_i + a_i m_i, one number in [0, 1] for each position of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokengate.arguments import non_negative
from tokengate.errors import TokenGateError, brief
from tokengate.gates.living import forget_holders, leader_of, remember_gate
from tokengate.gates.positions import Positions
from tokengate.gates.score_counts import count_scores, no_counts
from tokengate.kernels.eager import is_exported
from tokengate.kernels.precision import KeepsFloat32, trainable_dtype
from tokengate.kernels.recomputation import is_learnt_from, is_trial
from tokengate.linears.linear_like import features_of
from tokengate.linears.stand_in import stand_in, write_over


class Gate(KeepsFloat32):
    """a_i in [0, 1] for every position of one layer. A gate is a subclass of about ten lines:

        @tokengate.register_gate("large")
        class Large(tokengate.Gate):
            def __init__(self, linear, *, start=0.0):
                super().__init__(linear)
                self.limit = self.new_parameter(1)
                nn.init.constant_(self.limit, start)

            def weights(self, positions):
                return torch.sigmoid(10 * (positions.r.clamp(max=1e3) - self.limit))

    The rules:

    - The keyword-only arguments of `__init__` are the options of `patch(gate_options=...)`; check
      them there, and raise `TokenGateError`. An option's value may not be a dict: to `patch`, a
      dict gives one value for each pattern of layers.
    - `weights` gives a, of shape `(...)`, as numbers or booleans. Where a_i = 0 the output is the
      base layer's, bit for bit, and the position counts as unmodified.
    - From backward a gets dL/da_i = mu_i = <dL/dh_i, m_i> (eq. 10) at every position, closed ones
      too, and autograd carries it on to what a was computed from.
    - Parameters come from `new_parameter`; they are trained with the modifications, but for a
      `threshold`, which is in the taus' group. Buffers are saved along if they are floating-point
      and persistent.
    - The base layer is not kept: what is wanted of it once is read in `__init__`. Where `to_empty`
      gives the model memory, a gate is made anew beside a layer whose weight is all NaN, for the
      values it has at first; see `reset_parameters`.

    Args:
        linear: the layer that is gated; it is only read.
    """

    options: dict[str, Any]
    """Those that `patch` was given for this layer."""
    stacks: ClassVar[bool] = False
    """Whether `weights` takes positions of several layers at once (`positions.groups`), with
    parameters that have one dimension more in front. If not, it is asked layer by layer."""
    # The slope of eq. 11 that `param_groups` was last asked for, kept for a saved adapter.
    s: float | None = None
    relative: bool = False
    """Whether s is a share of the median of r in each step, as `total_steps` sets it."""
    # Whether it is a copy of one that a schedule led, which leads no copy.
    _was_led: bool = False
    # Its threshold at first.
    _first: float = 0.0
    # What its group of an optimiser was to have then: tau's learning rate alpha * s, betas and eps.
    _rule: dict[str, Any] | None = None
    # What it adds to for others, who name it; see `count_in`.
    # No buffer: DistributedDataParallel would send one rank's to all others in every forward.
    _counts: ClassVar[tuple[str, ...]] = ("_seen", "_looked")
    # Of these, what its scores are counted in, see `score_counts`.
    _seen: Tensor | None = None
    # Likewise, where somebody only looks: not in compiled code, which would be compiled anew.
    _looked: Tensor | None = None
    closes_below: ClassVar[float | None] = None
    """The score below which it closes in evaluation, if it has no threshold, but decides by one."""
    # What `scale_penalty` sets: what the loss is multiplied by, in the gradients that a gate sees.
    _unit: Tensor | None = None
    skipped: int = 0
    """Optimiser steps in which a gradient of this gate was not finite, and moved nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        # Where copies and what is unpickled come by, too.
        gate = super().__new__(cls)
        remember_gate(gate)
        return gate

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._set_up(trainable_dtype(linear.weight), linear.weight.device)
        self.in_features, self.out_features = features_of(linear)

    def _set_up(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.options = {}
        self._dtype, self._device = dtype, device

    @classmethod
    def beside(cls, linear: nn.Linear, **options: Any) -> Gate:
        """A gate of this kind for a layer."""
        gate = cls(linear, **options)
        gate.options = dict(options)
        if gate.threshold is not None and not gate.threshold.is_meta:
            gate._first = float(gate.threshold.detach().max())
        return gate

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A trainable parameter of `shape`, of zeros; float32 beside a 16-bit base."""
        return nn.Parameter(torch.zeros(shape, dtype=self._dtype, device=self._device))

    def reset_parameters(self) -> None:
        """Give its parameters and buffers the values they had at first.

        They are those of a gate with the same options beside a layer whose weight is all NaN: a
        gate that reads W0 in `__init__` must define this itself.
        """
        linear = stand_in(self.in_features, self.out_features, self, self._dtype)
        fresh = type(self).beside(linear, **self.options)
        write_over(self.parameters(recurse=False), fresh.parameters(recurse=False))
        write_over(self.buffers(recurse=False), fresh.buffers(recurse=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module's; assigning one comes by here."""
        super().register_parameter(name, param)
        forget_holders()

    @property
    def threshold(self) -> Tensor | None:
        """One element: positions whose score is below it are closed, where there is such a thing.

        It is reported, calibrated, and led by a `SparsitySchedule`; a parameter is trained in the
        taus' group.
        """
        return None

    @property
    def is_led(self) -> bool:
        """Whether a `SparsitySchedule` sets its threshold at present."""
        return leader_of(self) is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_was_led": self._was_led or self.is_led}

    @property
    def counts_scores(self) -> bool:
        """Whether the scores of the positions that it decides in training are counted."""
        return self._counted() is not None

    def set_pace(self, relative: bool) -> None:
        """Whether steps of tau are in units of r's median from now on, see `training`'s `pace`."""
        self.relative = relative
        if not self.is_led:
            self.count_alone()

    def count_alone(self) -> None:
        """What it counts while nobody leads it: scores, if its own pace is relative."""
        paced = self.relative and self.threshold is not None
        self.count_in(*(("_seen",) if paced else ()))

    def count_in(self, *names: str) -> None:
        """From now on, and from 0, it adds to these of its `_counts`, and to no other."""
        for name in self._counts:
            if name in names:
                setattr(self, name, self._zeros(name))
            elif getattr(self, name) is not None:
                setattr(self, name, None)

    def _zeros(self, name: str) -> Tensor:
        """One of its `_counts`, beside what it has."""
        return no_counts(self._place())

    def _place(self) -> torch.device:
        """Where it is."""
        own = self.threshold
        return next(self.parameters()).device if own is None else own.device

    def scores(self, positions: Positions) -> Tensor:
        """What `weights` compares with `threshold`, `(...)` and >= 0, as constants: here r."""
        with torch.no_grad():
            return positions.r

    def weights(self, positions: Positions) -> Tensor:
        """a for these positions, `(...)`."""
        raise NotImplementedError(f"{type(self).__name__} must define weights(positions).")

    def forward(self, positions: Positions) -> Tensor:
        """a, checked: `(...)`, in `positions.dtype`, or booleans.

        Raises:
            TokenGateError: `weights` gave something of another shape; a gate that learns is
                exported in training mode.
        """
        if self.training and is_exported() and any(p.requires_grad for p in self.parameters()):
            raise TokenGateError(
                f"an export was asked of a {type(self).__name__} in training mode, and a graph has "
                "outputs but not how a gate learns: call model.eval() first."
            )
        a: Any = self.weights(positions)
        if isinstance(a, Tensor) and a.shape == (1,) and not positions.shape:
            a = a.reshape(())  # of one position alone, beside a parameter of one element
        if not isinstance(a, Tensor) or a.shape != positions.shape:
            found = f"shape {tuple(a.shape)}" if isinstance(a, Tensor) else brief(a)
            raise TokenGateError(
                f"{type(self).__name__} gave weights of {found} for positions of shape "
                f"{tuple(positions.shape)}: return one number for each."
            )
        return a if a.dtype in (torch.bool, positions.dtype) else a.to(positions.dtype)

    def count(self, scores: Tensor | None, mask: Tensor | None) -> None:
        """Count the scores of one call, samples first, if somebody wants that."""
        if scores is None:
            return
        into = self._counted()
        if into is not None and is_learnt_from():
            count_scores(into, scores, mask)

    def _counted(self) -> Tensor | None:
        """What scores are counted in."""
        if self._seen is not None or torch.compiler.is_compiling():
            return self._seen
        return self._looked

    def _kept(self) -> Iterable[Tensor]:
        return [*self.parameters(recurse=False), *self.buffers(recurse=False)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        super()._apply(fn, recurse)
        # What is counted is no buffer, and follows them to another device: from 0, as in each step.
        on = {name: own for name in self._counts if (own := getattr(self, name)) is not None}
        if on and {t.device for t in on.values()} - {self._place()}:
            self.count_in(*on)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.count_alone()  # a copy, whom nobody leads


class LedGate(Gate):
    """A gate whose threshold has no gradient: a `SparsitySchedule` sets it, or `calibrate`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._trained = [False]  # which the views of a stack of gates share

    @property
    def trained(self) -> bool:
        """Whether it has decided of positions in training; not kept in compiled code."""
        return self._trained[0]

    def new_threshold(self, name: str) -> None:
        """A buffer of shape (1,), of 0, which stays float32, and is saved."""
        self.register_buffer(name, torch.zeros(1, dtype=self._dtype, device=self._device))

    def forward(self, positions: Positions) -> Tensor:
        """As every gate's."""
        if not self.trained and not torch.compiler.is_compiling():
            self._trained[0] = torch.is_grad_enabled() and not is_trial()
        return super().forward(positions)


class PenalisedGate(Gate):
    """A gate whose gradient has a term of its own for each position, times its `penalty`."""

    @property
    def penalty(self) -> float:
        """lambda, as the user gave it."""
        return self._penalty

    @penalty.setter
    def penalty(self, value: float) -> None:
        self._penalty = non_negative("penalty", value)

    def pull(self) -> Tensor | float:
        """What a position adds: lambda in its unit (`scale_penalty`)."""
        unit = 1.0 if self._unit is None else self._unit
        # A new tensor, because backward may come after the next change.
        pulled = self._penalty * unit
        return pulled.to(next(self.parameters()).device) if isinstance(pulled, Tensor) else pulled
