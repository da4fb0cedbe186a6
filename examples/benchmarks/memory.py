"""What a training step takes of memory, against PEFT and the frozen base.

Kept: what forward keeps for backward, beyond parameters and buffers. Peak: the most that the whole
step holds at once, beyond what was held before it.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --device cuda --shape llama3-8b --dtypes bfloat16
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from functools import partial

import torch
from comparison import compare
from results import Found
from rounds import in_turns
from settings import Setting, parser
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from variants import Training, trainings

MIB = 2**20
os.environ["KINETO_LOG_LEVEL"] = "99"  # or the profiler prints a line at each start and stop


def kept(training: Training) -> float:
    """MiB of all storages that the graph of the loss holds and the model does not."""
    packed: list[weakref.ref[Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        t = t.detach()  # or a node that keeps its own output is never freed
        packed.append(weakref.ref(t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = training.loss()
    model = training.model
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # Of what was let go by now, the address may be another's.
    storages = [t.untyped_storage() for ref in packed if (t := ref()) is not None]
    del loss  # which held them until here
    sizes = {s.data_ptr(): s.nbytes() for s in storages}
    return sum(size for at, size in sizes.items() if at not in own) / MIB


def peak(step: Callable[[], object]) -> float:
    """MiB held at once at most while `step` runs, beyond what was held before."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / MIB


def main() -> None:
    """Measure every setting."""
    options = parser(__doc__.splitlines()[0], "memory")
    # It hardly varies; the optimiser's state is there after one step.
    options.set_defaults(rounds=2, warmup=1)
    options = options.parse_args()

    def measure(variants: dict[str, nn.Module], setting: Setting) -> Found:
        found = trainings(variants, setting).items()
        cases = {
            "kept": {name: partial(kept, training) for name, training in found},
            "peak": {name: partial(peak, training.step) for name, training in found},
        }
        return {
            f"{setting}, {case}": in_turns(measures, options, f"{setting}, {case}")
            for case, measures in cases.items()
        }

    compare(options, measure, "MiB")


if __name__ == "__main__":
    main()
