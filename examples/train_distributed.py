"""Several processes, plain PyTorch: a small Llama learns a text under DDP or FSDP2.

    torchrun --nproc_per_node 2 examples/train_distributed.py --engine fsdp2

On GPUs one process each, without GPUs all on the CPU. The order is what matters: patch, wrap, then
tell lambda how many processes there are, then make the optimiser. The text is this project's own
license, byte by byte; the model comes from a config, so nothing is downloaded. What is left is one
ordinary adapter, which `tokengate.load` takes anywhere, whatever the number of processes, and the
sparsity over all of them.
"""

import argparse
import os
import pathlib

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import tokengate

ROOT = pathlib.Path(__file__).parents[1]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def make_model(width, layers):
    """The same on every process, by its seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # It was never pretrained, so embedding and head have to learn, too.
    return tokengate.patch(model, TARGETS, rank=8, penalty=1e-4, train=["embed_tokens", "lm_head"])


def wrap(model, engine, device):
    """DDP is a module around the model; FSDP2 is the model itself, in its parts and as a whole."""
    model.to(device)
    if engine == "ddp":
        return DistributedDataParallel(model)
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def batches(text, steps, size, length, rank, ranks):
    """Of every batch, which all processes draw alike, this one's part."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (size, 1), generator=generator)
        yield text[starts + torch.arange(length)].chunk(ranks)[rank]


def main():
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32, help="sequences of all processes together")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "outputs/train_distributed")
    args = parser.parse_args()
    width, layers, length = (32, 2, 32) if args.smoke else (128, 4, 128)
    steps = min(args.steps, 30) if args.smoke else args.steps

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    model = make_model(width, layers)
    run = wrap(model, args.engine, device)
    tokengate.scale_penalty(model, ranks)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=3e-3, total_steps=steps))

    text = torch.tensor(list((ROOT / "LICENSE").read_bytes()))
    bar = tqdm(total=steps, desc=f"{args.engine} x {ranks}", disable=rank != 0)
    for ids in batches(text, steps, args.batch, length, rank, ranks):
        ids = ids.to(device)
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix_str(f"loss of rank 0 {loss.item():.3f}", refresh=False)
        bar.update()
    bar.close()

    with tokengate.record(model) as rec, torch.no_grad():
        for ids in batches(text, 4, args.batch, length, rank, ranks):
            run(input_ids=ids.to(device), use_cache=False)
    report = rec.report(reduce=True)  # called by every process
    if args.engine == "fsdp2" or rank == 0:  # what is sharded is gathered from all
        tokengate.save(model, args.out, report=report)
    if rank == 0:
        print(report)
        print(f"the adapter is in {args.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
