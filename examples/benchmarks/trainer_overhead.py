"""What TokenGateCallback costs: step time and peak memory of the Trainer, with and without it.

The same patched model is trained by the same Trainer, which without the callback steps the taus as
any parameter. The two are trained in turns, a round each, so that what else the machine does meets
both. A round's overhead is that of its median step; what is reported is the median over rounds, and
how far they are apart. Processor time counts what this process computes, and not what it waits for
on a machine that others use too. Peak memory is that of a process of its own for each.

    python examples/benchmarks/trainer_overhead.py --rounds 5

Sizes are chosen for two CPU cores; on a GPU pass larger ones.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

import tokengate
from tokengate.integrations.trainer import TokenGateCallback

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Texts(Dataset):
    """Random tokens."""

    def __init__(self, count: int, length: int) -> None:
        self.ids = torch.randint(0, 1024, (count, length))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Clock(transformers.TrainerCallback):
    """Seconds, of the clock and of the processor, from the beginning of a step to the next's.

    With what a step logs.
    """

    def __init__(self) -> None:
        self.begun: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Note the time, when all that was asked of a GPU is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.begun.append((time.perf_counter(), time.process_time()))

    def median(self, warmup: int) -> list[float]:
        """Both, of the steps after the first few."""
        pairs = zip(self.begun[warmup:], self.begun[warmup + 1 :], strict=False)
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairs]
        return [statistics.median(seconds) for seconds in zip(*steps, strict=True)]


def train(options: argparse.Namespace, gated: bool) -> list[float]:
    """One training; the seconds of its median step, of the clock and of the processor."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        vocab_size=1024,
    )
    model = transformers.LlamaForCausalLM(config)
    tokengate.patch(model, TARGETS, "lora", rank=16)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            logging_steps=options.logging_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=Texts(options.batch * options.steps, options.length),
            callbacks=[clock, *([TokenGateCallback()] if gated else [])],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock.median(warmup=3)


def peak_memory(options: argparse.Namespace) -> float:
    """MiB at the most: of the GPU, or of this process."""
    train(options, options.only == "with")
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Print a table, or for `--only` one number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["with", "without"])
    options = parser.parse_args()
    if options.only:
        print(peak_memory(options))
        return
    # Before anything else is in this process's own memory.
    memory = {}
    for kind in ("without", "with"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", kind]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        memory[kind] = float(found.split()[-1])
    train(options, False)  # what is done once in a process
    rounds: dict[str, list[list[float]]] = {"without": [], "with": []}
    for turn in range(options.rounds):
        for kind in ("without", "with") if turn % 2 else ("with", "without"):
            rounds[kind].append(train(options, kind == "with"))
    print("callback   wall ms/step   processor ms/step   peak MiB")
    for kind, each in rounds.items():
        wall, processor = (1e3 * statistics.median(s) for s in zip(*each, strict=True))
        print(f"{kind:8} {wall:14.1f} {processor:19.1f} {memory[kind]:10.1f}")
    for index, what in enumerate(("wall time", "processor time")):
        pairs = zip(rounds["with"], rounds["without"], strict=True)
        more = sorted(100 * (one[index] / other[index] - 1) for one, other in pairs)
        print(
            f"{what}: {statistics.median(more):+.2f} %, rounds {more[0]:+.2f} to {more[-1]:+.2f} %"
        )
    print(f"peak memory: {100 * (memory['with'] / memory['without'] - 1):+.2f} %")


if __name__ == "__main__":
    main()
