"""Do GPUs that divide a model train it as those that do not? What no CPU can tell.

    torchrun --nproc_per_node 2 examples/benchmarks/divided.py --engine ddp
    torchrun --nproc_per_node 2 examples/benchmarks/divided.py --engine fsdp2
    torchrun --nproc_per_node 2 examples/benchmarks/divided.py --engine zero3

Each trains the same small Llama with AdaLoRA, its budget and a wanted sparsity, writes its losses
and taus to `--out`, and prints how far they are from those of `ddp` there. Without `--dtype` all is
float32 and must agree to 1e-4. What a CPU has not shown, and this is for:

- NCCL, and FSDP2 as Accelerate itself enables it; `--engine zero1` and `zero2`;
- `--dtype float16` (a GradScaler under FSDP2, ZeRO's loss scale) and `bfloat16`;
- `--offload`: FSDP2's parameters, or ZeRO's optimiser, in the CPU's memory.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

import tokengate
from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer

KEPT = ("loss", "tau_mean", "tau_min", "tau_max", "sparsity", "orthogonality")


def engine(run: argparse.Namespace) -> dict[str, Any]:
    """TrainingArguments that divide the model, or do not."""
    if run.engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": run.offload}}
    if run.engine == "ddp":
        return {}
    zero: dict[str, Any] = {"stage": int(run.engine[-1]), "stage3_param_persistence_threshold": 0}
    if run.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = dict.fromkeys((*names, "gradient_clipping"), "auto")
    precisions = {name: {"enabled": "auto"} for name in ("bf16", "fp16")}
    return {"deepspeed": config | precisions | {"zero_optimization": zero}}


def train(run: argparse.Namespace, world: int) -> list[dict[str, float]]:
    """What was logged at every step."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    options = {"rank": 8, "target_rank": 4, "penalty": 1e-4}
    tokengate.patch(model, "all-linear", "adalora", exclude="lm_head", **options)
    rows = torch.randint(0, 512, (16 * run.steps, 64))
    trainer = TokenGateTrainer(
        model,
        TrainingArguments(
            str(run.out / run.engine), per_device_train_batch_size=8 // world, max_steps=run.steps,
            gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, report_to="none",
            save_strategy="no", bf16=run.dtype == "bfloat16", fp16=run.dtype == "float16",
            use_cpu=not torch.cuda.is_available(), **engine(run),
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[TokenGateCallback(target_sparsity=0.6)],
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: entry[key] for key in KEPT if key in entry} for entry in log]


def main() -> None:
    """One engine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    engines = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
    parser.add_argument("--engine", choices=engines, default="ddp")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/divided"))
    run = parser.parse_args()
    found = train(run, int(os.environ.get("WORLD_SIZE", 1)))
    if int(os.environ.get("RANK", 0)) == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / f"{run.engine}-{run.dtype}.json").write_text(json.dumps(found))
        first = run.out / f"ddp-{run.dtype}.json"
        known = json.loads(first.read_text()) if first.exists() else found
        for key in found[-1]:
            pairs = [(a.get(key, 0.0), b.get(key, 0.0)) for a, b in zip(found, known, strict=True)]
            far = max(abs(a - b) for a, b in pairs)
            print(f"{key}: {found[-1][key]:.6g} at the end, at most {far:.1e} from ddp's")


if __name__ == "__main__":
    main()
