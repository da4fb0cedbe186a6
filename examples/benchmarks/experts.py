"""What gates on fused experts cost: a training step beside PEFT's `target_parameters`.

Both train LoRA of the same rank on every expert's projections of small mixtures, from the same
values, and take their steps in turns, in one process. PEFT makes every expert's whole weight anew
in each forward; here each token passes its own experts' factors.

    python examples/benchmarks/experts.py
    python examples/benchmarks/experts.py --device cuda --dtype bfloat16 --hidden 2048 --inner 768
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from memory import peak
from torch import nn

import tokengate

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(kind: str, options: argparse.Namespace) -> nn.Module:
    """A small Mixtral (8 experts, 2 for each token) or Qwen3-MoE (64 experts, 8)."""
    import transformers

    sizes = {
        "hidden_size": options.hidden,
        "intermediate_size": options.inner,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }
    own = {"num_local_experts": 8, "num_experts_per_tok": 2}
    if kind == "qwen3_moe":
        own = {"num_experts": 64, "num_experts_per_tok": 8, "head_dim": options.hidden // 4}
        own |= {"moe_intermediate_size": options.inner}
    config = transformers.CONFIG_MAPPING[kind](**sizes, **own)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(options.device, getattr(torch, options.dtype)).requires_grad_(False)


def variants(kind: str, options: argparse.Namespace) -> dict[str, nn.Module]:
    """The frozen base, ours with and without gates, and PEFT's."""
    import peft

    base = mixture(kind, options)
    found = {"base": base}
    for name, gate in (("tokengate", "threshold"), ("tokengate, ungated", False)):
        model = copy.deepcopy(base)
        found[name] = tokengate.patch(model, TARGETS, rank=options.rank, gate=gate, tau=1e-3)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules=[], target_parameters=TARGETS
    )
    found["PEFT"] = peft.get_peft_model(copy.deepcopy(base), config)
    for model in found.values():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("modification.B" in name or "lora_B" in name):
                nn.init.normal_(parameter, std=0.01)
    return found


def step_of(model: nn.Module, options: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward and optimiser; of the base, forward and a backward to the embeddings."""
    ids = torch.randint(512, (options.batch, options.length), device=options.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained or [nn.Parameter(torch.zeros(1))], lr=1e-4)
    model.train()

    def step() -> None:
        states = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore
        loss = model(inputs_embeds=states).logits.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Both mixtures, time and memory."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--threads", type=int, default=2)
    for name, default in (
        ("hidden", 256),
        ("inner", 256),
        ("layers", 2),
        ("rank", 8),
        ("batch", 2),
        ("length", 128),
        ("rounds", 15),
    ):
        options.add_argument(f"--{name}", type=int, default=default)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    for kind in ("mixtral", "qwen3_moe"):
        steps = {name: step_of(model, asked) for name, model in variants(kind, asked).items()}
        for step in steps.values():  # which makes the optimiser's state
            step()
        peaks = {name: peak(step) for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(asked.rounds + 2):
            for name, step in steps.items():
                # CPU seconds: what else runs on the machine takes no part in them.
                clock = time.perf_counter if asked.device == "cuda" else time.process_time
                start = clock()
                step()
                if asked.device == "cuda":
                    torch.cuda.synchronize()
                if round_ > 1:
                    times[name].append(clock() - start)
        print(f"{kind}: hidden {asked.hidden}, experts' {asked.inner}, rank {asked.rank}")
        base = peaks["base"]
        for name, own in times.items():
            ratio = statistics.median(own) / statistics.median(times["PEFT"])
            above = peaks[name] - base
            share = above / (peaks["PEFT"] - base)
            print(
                f"  {name:20} {1e3 * statistics.median(own):8.1f} ms ({ratio:.2f} of PEFT's), "
                f"peak above the base's {above:8.1f} MiB ({share:.2f})"
            )


if __name__ == "__main__":
    main()
