"""What is compared on what: the shapes of the frozen LLaMA, and the options of all scripts."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES = {
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # Its language model, which is Vicuna's.
    "llava-1.5-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
    },
}

# What PyTorch calls CPUs on which products of bfloat16 are emulated.
WITHOUT_BFLOAT16 = ("DEFAULT", "NO AVX", "AVX2")


@dataclass(frozen=True)
class Setting:
    """One case: what is trained on what."""

    method: str
    dtype: str
    dropout: float
    rank: int
    shape: dict[str, int]
    batch: int
    length: int
    device: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.dtype}, dropout {self.dropout:g}"


def _number(text: str) -> tuple[str, int]:
    key, value = text.split("=")
    return key, int(value)


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options of all scripts; a script changes the defaults that do not suit it."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--shape", choices=SHAPES, default="small")
    options.add_argument(
        "--config", type=_number, nargs="*", default=[], help="NAME=NUMBER of LlamaConfig instead"
    )
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    options.add_argument(
        "--rank", type=int, default=32, help="AdaLoRA starts at twice as much and ends at it"
    )
    options.add_argument("--methods", nargs="+", default=["lora", "dora", "adalora"])
    options.add_argument(
        "--dtypes",
        nargs="+",
        help="of the base; by default float32, and bfloat16 where the processor has it",
    )
    options.add_argument("--dropouts", nargs="+", type=float, default=[0.05])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--same-dtype", action="store_true", help="PEFT with adapters of the base's dtype, too"
    )
    options.add_argument("--out", type=Path, default=Path("outputs/benchmarks") / name)
    return options


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Every combination of what was asked for."""
    torch.set_num_threads(options.threads)
    if options.dtypes is None:
        options.dtypes = ["float32", "bfloat16"]
        if options.device == "cpu" and torch.backends.cpu.get_cpu_capability() in WITHOUT_BFLOAT16:
            options.dtypes = ["float32"]
            print("bfloat16 is left out: it would take ten times as long as float32 on this CPU")
    shape = {**SHAPES[options.shape], **dict(options.config)}
    for one in itertools.product(options.methods, options.dtypes, options.dropouts):
        yield Setting(
            *one,
            options.rank,
            shape,
            options.batch,
            options.length,
            options.device,
            options.seed,
        )
