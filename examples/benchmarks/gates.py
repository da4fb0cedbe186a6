"""What the gates that a schedule leads cost beside the paper's: time, memory, operations of a step.

All are led by a SparsitySchedule, in the part of a training in which its share of the positions is
closed, and take their steps in turns, in one process, from the same values. Of this model, which is
no trained one, every position that "firm" opens is open in part, and that is what it costs.

    python examples/benchmarks/gates.py --rounds 30
    python examples/benchmarks/gates.py --device cuda --shape llama3-8b --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
import transformers
from memory import kept, peak
from results import Found, report
from rounds import in_turns, timed
from settings import Setting, parser, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from variants import TARGETS, THRESHOLD, Ours, sparsity, tokens

import tokengate

GATES = (THRESHOLD, "firm", "fisher")
# Steps of a training that none of these comes to the end of, and where in it they begin.
STEPS, BEGIN = 100_000, 60_000


class Counter(TorchDispatchMode):
    """How many operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operations(training: Ours) -> int:
    """Of a step."""
    with Counter() as counter:
        training.step()
    return counter.calls


def trainings(setting: Setting, share: float) -> dict[str, Ours]:
    """The same one with each gate; two steps have been taken."""
    torch.manual_seed(setting.seed)
    config = transformers.LlamaConfig(**setting.shape)
    with torch.device(setting.device):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, setting.dtype)
        )
    found = {}
    for gate in GATES:
        model: nn.Module = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        torch.manual_seed(setting.seed)
        options = {"rank": setting.rank, "dropout": setting.dropout}
        tokengate.patch(model, TARGETS, setting.method, gate=gate, **options)
        for layer in tokengate.layers(model).values():
            for parameter in layer.modification.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        found[gate] = training = Ours(model, tokens(setting), setting.method)
        training.schedule = tokengate.SparsitySchedule(model, training.optimizer, share, STEPS)
        training.step()
        training.schedule.load_state_dict({**training.schedule.state_dict(), "step": BEGIN})
        training.step()
    return found


def main() -> None:
    """Measure every setting."""
    options = parser(__doc__.splitlines()[0], "gates")
    options.add_argument("--sparsity", type=float, default=0.5, help="the share that is closed")
    options.set_defaults(methods=["lora", "dora"], rounds=10, warmup=2)
    options = options.parse_args()
    found: Found = {}
    counted, closed = {}, {}
    once = argparse.Namespace(seed=options.seed, warmup=0, rounds=1)  # memory is the same each time
    for setting in settings(options):
        each = trainings(setting, options.sparsity)
        counted[str(setting)] = {gate: operations(training) for gate, training in each.items()}
        cases = {"kept, MiB": kept, "peak, MiB": lambda training: peak(training.step)}
        steps = {gate: training.step for gate, training in each.items()}
        found[f"{setting}, ms"] = timed(steps, options, f"{setting}, ms")
        closed[str(setting)] = sparsity(each[THRESHOLD].model, tokens(setting))
        for case, measure in cases.items():
            measures = {gate: partial(measure, training) for gate, training in each.items()}
            found[f"{setting}, {case}"] = in_turns(measures, once, f"{setting}, {case}")
    report(found, "number", options, operations=counted, sparsity=closed)
    for setting, numbers in counted.items():
        print(f"operations of a step, {setting}: {numbers}")


if __name__ == "__main__":
    main()
