"""The gates that a schedule leads: what a step has shown them, and what they are given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError, UselessGateWarning, brief
from tokengate.gates.base import Gate
from tokengate.gates.fisher import FisherGate
from tokengate.gates.living import lead, lead_no_more, leader_of, tau_of
from tokengate.gates.score_counts import no_counts, share_below, shares_of
from tokengate.gates.threshold import TokenGate
from tokengate.layers.gated_linear import Gated
from tokengate.sharding import anywhere, gathered, in_processes, local_part

_STATE = ("folded", "called", "since", "unit")


class LedGates:
    """Several gates, led together.

    Args:
        gates: by the name of their layer; of experts one has a threshold for each.
    """

    def __init__(self, gates: Mapping[str, Gate]) -> None:
        self.by_name = dict(gates)
        # On one device, however many the model is on.
        self.device = self.thresholds[0].device
        # Of each, if all are led by one threshold: a gate decides for one module, or all experts.
        sizes = no_counts(self.device).new_tensor([t.numel() for t in self.thresholds])
        self.weights = sizes / sizes.sum()
        # Those that average what backward gives them, and how often each of their modules has.
        self._fisher = [gate for gate in gates.values() if isinstance(gate, FisherGate)]
        self.folded = no_counts(self.device).new_zeros(sum(gate.T.numel() for gate in self._fisher))
        # In how many steps each has seen a position, and of how many since the first.
        self.called = no_counts(self.device).new_zeros(len(sizes))
        self.since = torch.zeros_like(self.called)
        # What E[||g||^2] is measured in; 0 before anything was.
        self.unit = self.called.new_zeros(())
        self._found = [local_part(threshold).detach().clone() for threshold in self.thresholds]
        # What it has given each; no number at first.
        self._written = torch.full_like(sizes, torch.nan)
        # Whether a threshold was trained, loaded or calibrated, of each; all ranks must ask.
        changed = (
            any(t > 0 and not math.isclose(t, gate._first, rel_tol=1e-6) for t in found.tolist())
            for gate, found in zip(gates.values(), self._found, strict=True)
        )
        self.are_set = anywhere(changed, self.thresholds)

    @property
    def thresholds(self) -> list[Tensor]:
        """Of all, as they are now: a model that is moved gives its buffers new ones."""
        return _thresholds(self.by_name.values())

    def begin(self, leader: object) -> None:
        """From now on they are led, count their scores and are fed."""
        for gate in self.by_name.values():
            gate.count_in("_seen", "_fed")
            lead(gate, leader)

    def end(self, leader: object) -> None:
        """No more; but for those that another one leads since."""
        for gate in [gate for gate in self.by_name.values() if leader_of(gate) is leader]:
            lead_no_more(gate)
            gate.count_alone()

    def check_present(self, model: nn.Module) -> None:
        """An error if one of them was taken out of `model`, or unpatched."""
        here = set(model.modules())
        gone = [name for name, gate in self.by_name.items() if gate not in here]
        if gone:
            raise TokenGateError(
                f"a state was to be loaded into a SparsitySchedule whose gate of {gone[0]!r} is in "
                f"this {type(model).__name__} no more: detach() it, make a new one for the gates "
                "that are there, and load the state into that."
            )

    def closed(self, seen: Tensor) -> Tensor:
        """The share that the thresholds close of what was seen, `(gates, BINS)`; all modules alike.

        Where M(x) is 0 everywhere that is nothing: such a threshold is of no use yet.
        """
        shares = []
        for own, threshold in zip(seen, self.thresholds, strict=True):
            log = gathered(threshold.detach()).reshape(-1).to(own).clamp(min=0).log2()
            shares.append(share_below(own.expand(len(log), -1), log) * own[1:-1].any())
        return torch.cat(shares).mean()

    def any_is_new(self, seen: Tensor) -> bool:
        """Whether one is not set, and its M(x) 0 in all that was seen, `(gates, BINS)`."""
        is_0 = seen.any(-1) & ~seen[:, 1:].any(-1)
        return any(new and not is_set for new, is_set in zip(is_0, self.are_set, strict=True))

    def write(self, log_values: Tensor) -> None:
        """Give each the threshold 2^value, or all the same: `(gates,)` or `(1,)`."""
        self._written = log_values.exp2().expand(len(self.by_name)).clone()
        with torch.no_grad():
            for threshold, value in zip(self.thresholds, self._written, strict=True):
                own = local_part(threshold)
                if own.numel():  # else another rank has it
                    own.copy_(value)

    def restore(self) -> None:
        """The thresholds as they were found, but for those that are loaded since."""
        written = zip(self.thresholds, self._found, self._written, strict=True)
        for threshold, found, value in written:
            own = local_part(threshold).data
            if bool((own == value.to(own)).all()):
                own.copy_(found)

    def forget(self) -> None:
        """What was counted and fed since the last step."""
        for gate in self.by_name.values():
            for name in gate._counts:
                if (counts := getattr(gate, name)) is not None:
                    counts.zero_()

    def collected(self) -> tuple[Tensor, list[Tensor]]:
        """What all ranks have counted since the last step, `(gates, BINS)`, and fed."""
        gates = list(self.by_name.values())
        seen = torch.stack([g._seen.to(self.device) for g in gates if g._seen is not None])
        fed = [gate._fed.to(seen) for gate in self._fisher if gate._fed is not None]
        flat = torch.cat([each.flatten() for each in fed]) if fed else seen.new_zeros(0)
        if in_processes():
            torch.distributed.all_reduce(seen)
            if len(flat):
                torch.distributed.all_reduce(flat)
        self.forget()
        parts = torch.split(flat, [each.numel() for each in fed])
        return seen, [part.view_as(each) for part, each in zip(parts, fed, strict=True)]

    def fold(self, fed: list[Tensor]) -> None:
        """Let each average what it was fed, in a unit of this step, by which it is like what is.

        A step of a smaller batch, of another scale of the loss or with one large loss would
        otherwise outweigh all others.
        """
        totals = torch.cat([new[..., -1].flatten() for new in fed])
        sizes = torch.cat([FisherGate.squares(new).flatten() for new in fed]) / totals
        so_far = torch.cat([gate.size.flatten().to(sizes) for gate in self._fisher])
        some = sizes.isfinite() & (sizes > 0)  # not so while M(x) = 0
        both = some & (so_far > 0)
        mean = torch.where(some, sizes, 0).sum() / some.sum()
        like = torch.where(both, sizes, 0).sum() / torch.where(both, so_far, 0).sum()
        unit = torch.where(both.any(), like, torch.where(self.unit > 0, self.unit, mean))
        self.unit = torch.where(some.any(), unit, self.unit)
        now = torch.where(some.any(), self.unit, 0)
        self.folded += totals * now > 0
        times = torch.split(self.folded.clamp(min=1), [gate.T.numel() for gate in self._fisher])
        for gate, new, folded in zip(self._fisher, fed, times, strict=True):
            new[..., -1] *= now
            gate.fold(new.to(gate.Q.device), folded.to(gate.Q.device))

    def weighed(self, seen: Tensor) -> Tensor:
        """The counts of each, where every module weighs alike: `(gates, BINS)`, all 1 together.

        Over all steps since its first one: one that is called in few of them, as an expert or with
        layer drop, weighs as much more in those.
        """
        shares = shares_of(seen)
        self.called += shares.sum(-1).round()
        self.since += self.called > 0
        weights = self.weights * self.since / self.called.clamp(min=1)
        return shares * weights.unsqueeze(-1)

    def state_dict(self) -> dict[str, Tensor]:
        """What it has counted, and in which unit."""
        return {name: getattr(self, name).clone() for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        for name in _STATE:
            getattr(self, name).copy_(state[name])


def _thresholds(gates: Iterable[Gate]) -> list[Tensor]:
    return [threshold for gate in gates if (threshold := gate.threshold) is not None]


def gates_to_lead(model: nn.Module, patched: dict[str, Gated], together: bool) -> dict[str, Gate]:
    """The gates with a threshold, by layer; an error without one, or if one is led already.

    If they are led `together`, also if their scores are not of one kind.
    """
    gates = {
        name: layer.gate
        for name, layer in patched.items()
        if layer.gate is not None and layer.gate.threshold is not None
    }
    if not gates:
        raise TokenGateError(
            f"SparsitySchedule was asked of a {type(model).__name__} none of whose layers has a "
            "gate with a threshold: patch it with gate='threshold', 'firm' or 'fisher'."
        )
    for name, gate in gates.items():
        if gate.is_led:
            raise TokenGateError(
                f"{name!r} has a SparsitySchedule already: call its detach() first (that of an "
                "interrupted Trainer's callback is callback.sparsity_schedule)."
            )
    if together:
        refuse_mixed("SparsitySchedule was asked to lead", gates)
    return gates


def refuse_mixed(asked: str, gates: Mapping[str, Gate]) -> None:
    """An error if one threshold for all was `asked` of gates whose scores are not of one kind."""
    kinds = {type(gate).scores: type(gate).__name__ for gate in gates.values()}
    if len(kinds) > 1:
        raise TokenGateError(
            f"{asked} {' and '.join(kinds.values())} by one threshold, and their scores have "
            "different units: pass per_layer=True, or patch with one gate."
        )


def refuse_unlearnt(gates: Mapping[str, Gate], learn_from: float) -> None:
    """An error if the threshold of one of them is not trained."""
    unlearnt = [(name, gate) for name, gate in gates.items() if tau_of(gate) is None]
    if unlearnt:
        name, gate = unlearnt[0]
        raise TokenGateError(
            f"learn_from={learn_from} was asked of {len(unlearnt)} gates, e.g. that of {name!r}, "
            f"whose threshold nothing trains ({type(gate).__name__}): leave learn_from out, or "
            'patch with gate="threshold" and a tau that is trainable.'
        )


def check_first_step(
    optimizer: torch.optim.Optimizer, led: Collection[Gated], seen: Tensor
) -> None:
    """An error if backward, or the model, was not called; a warning if others are trained.

    Args:
        optimizer: whose first step it is.
        led: the layers whose gates are.
        seen: what was counted, `(gates, BINS)`.
    """
    gates = [layer.gate for layer in led if layer.gate is not None]
    taus = [gate.tau for gate in gates if isinstance(gate, TokenGate) and gate.tau.requires_grad]
    skipped = any(gate.skipped for gate in gates)
    if taus and not skipped and all(tau.grad is None for tau in taus):
        raise TokenGateError(
            f"no gradient of tau was seen in any of the {len(taus)} gates that the "
            "SparsitySchedule leads: call loss.backward() before optimizer.step(); under "
            "DeepSpeed's ZeRO, which keeps gradients to itself, train by TokenGateCallback."
        )
    if not bool(seen.any()):
        raise TokenGateError(
            f"SparsitySchedule saw no position in any of its {len(gates)} layers before "
            "the first optimizer.step(): call the model, with gradients, and loss.backward() "
            "before it."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parts = [*(layer.modification for layer in led), *gates]
    trained = [id(p) for part in parts for p in part.parameters() if p.grad is not None]
    if held and trained and held.isdisjoint(trained):
        warnings.warn(
            f"SparsitySchedule was given an {type(optimizer).__name__} that holds no parameter "
            f"of the {len(gates)} layers that it leads: give it the optimizer that trains them, "
            "whose steps it counts.",
            UselessGateWarning,
            stacklevel=9,
        )


def check_state(state: Mapping[str, Any], led: Collection[str], thresholds: Tensor) -> None:
    """An error if the state of a schedule is of other layers than are `led`, or another kind."""
    if "led" not in state or "way" not in state["tracker"]:
        raise TokenGateError(
            "the state to load is of a SparsitySchedule of an earlier version, which averaged "
            "otherwise: finish that training with that version, or begin a schedule anew."
        )
    if list(state["layers"]) != list(led):
        other = sorted({*state["layers"]} ^ {*led})
        raise TokenGateError(
            "the state to load and this schedule differ in the layer "
            f"{brief(other[0] if other else state['layers'][0])}: load it into a model that is "
            "patched in the same way."
        )
    if state["thresholds"].shape != thresholds.shape:
        raise TokenGateError(
            "the state to load is of a schedule with another per_layer: make this one as that "
            "one was made."
        )
