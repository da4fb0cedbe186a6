"""A training of experts on one process or on two, for test_expert_ranks.py."""

import datetime

import torch
import torch.distributed as dist
from mixtures import Experts, Mixture
from ranks import become
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tokengate


def training(engine):
    torch.manual_seed(0)
    model = Mixture(Experts(4, 6, 5, way="grouped"))
    tokengate.patch(model, ["experts.w"], rank=2, tau=0.3, experts={"experts.w": "eoi"})
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith("tau"):
            p.data += 0.3 * torch.randn_like(p)
    generator = torch.Generator().manual_seed(1)
    x, index = torch.randn(4, 3, 5, generator=generator), torch.rand(12, 4, generator=generator)
    index = index.topk(2, -1).indices.view(4, 3, 2)
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        x, index = x.chunk(world)[rank], index.chunk(world)[rank]
        tokengate.scale_penalty(model, world)
    if engine == "ddp":
        model = DistributedDataParallel(model)
    if engine == "fsdp2":
        fully_shard(model)
    groups = tokengate.param_groups(getattr(model, "module", model), lr=1e-3, s=1e-2)
    optimizer = torch.optim.AdamW(groups, eps=1e-3)
    taus = []
    for _ in range(3):
        model(x, index.flatten(0, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        (tau,) = (p for n, p in model.named_parameters() if n.endswith("tau"))
        whole = tau.full_tensor() if engine == "fsdp2" else tau
        taus.append(whole.detach().clone())
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n.removeprefix("module."): getattr(p, "full_tensor", lambda p=p: p)().detach()
             for n, p in values.items()}  # fmt: skip
    return torch.stack(taus), found


def both(folder, rank, port):
    become(rank, port)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    found = {engine: training(engine) for engine in ("ddp", "fsdp2")}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()
