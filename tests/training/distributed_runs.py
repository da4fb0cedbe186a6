"""Trainings on one process or on two, for test_distributed.py: what runs in processes of their own.

The two see one half each of every batch, so that averaged they see what the one sees.
"""

import contextlib
import copy
import datetime
import os
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from models import Net, away_from_initialisation
from ranks import become
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.errors import NonFiniteWarning
from tokengate.training.leading import sparsity_schedule

METHODS = ["lora", "dora", "adalora", "adapter"]
# Of each stage; all four of stages 2 and 3 are trained by the Trainer in its own tests.
ZERO = {1: METHODS, 2: ["dora"], 3: ["lora"]}
ZERO_STEPS = 4  # each of which asks the other rank dozens of times
STEPS = 10
CLIP = 0.01  # of a norm


def join(rank, port):
    """Be one of two processes, and make their group."""
    become(rank, port)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(x):
    """This rank's part of a batch."""
    return x.chunk(ranks())[dist.get_rank()] if dist.is_initialized() else x


def averaged(loss):
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
    return loss.item() / ranks()


def patched(method="lora", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Net().to(dtype)
    tau = 0.9 if method == "dora" else 0.2  # some open, some closed
    options = {"rank": 4, "tau": tau, "penalty": 1e-4, **options}
    tokengate.patch(model, ["q_proj", "v_proj", "fc1"], method, **options)
    return away_from_initialisation(model, 0.3)


def checkpointed(model):
    """Each block computes its forward again in backward."""
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    return model


def wrapped(model, engine):
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine in ("fsdp2", "hsdp"):
        mesh = None
        if engine == "hsdp":  # replicas of what is sharded
            mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, 8, generator=generator).to(dtype)


def taus(model):
    found = [layer.gate.tau.detach() for layer in tokengate.layers(model).values()]
    return torch.cat([t.full_tensor() if hasattr(t, "full_tensor") else t for t in found])


def step_of(run, model, optimizer, x, orthogonal=False, clip=None):
    """One step of training; the loss of the whole batch."""
    optimizer.zero_grad()
    loss = run(share(x)).float().square().mean()
    if orthogonal:
        loss = loss + 0.1 * tokengate.orthogonality(model)
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    return averaged(loss)


def training(
    method,
    engine,
    unit=True,
    dtype=torch.float32,
    schedule=None,
    adam=False,
    budget=True,
    again=False,
    clip=None,
):
    """Losses, taus and what else changes, at every step."""
    model = patched(method, dtype)
    run = wrapped(checkpointed(model) if again else model, engine)
    tokengate.scale_penalty(model, ranks() if unit else 1)
    groups = tokengate.param_groups(model, lr=1e-2, s=1e-2)
    own = tokengate.TauAdam(groups.pop()["params"], s=1e-2) if adam else None
    optimizer = torch.optim.AdamW(groups)
    path = {"losses": [], "taus": [], "masks": [], "thresholds": [], "sparsity": []}
    allocator = led = None
    budget = budget and method == "adalora"
    if budget:
        allocator = tokengate.RankAllocator(model, optimizer, total_steps=STEPS)
    if schedule is not None:
        led = tokengate.SparsitySchedule(model, optimizer, 0.5, STEPS, **schedule)
    for step in range(STEPS):
        # The first step alone, as a report costs as much as a step.
        with tokengate.record(model) if step == 0 else contextlib.nullcontext() as rec:
            with mock.patch.object(sparsity_schedule, "say_if_missed") as said:
                loss = step_of(run, model, optimizer, batch(step, dtype), budget, clip)
            path["losses"].append(loss)
        if rec is not None:
            path["recorded"] = rec.report(reduce=True).sparsity
        if own is not None:
            own.step()
        path["taus"].append(taus(model).tolist())
        if allocator is not None:
            path["masks"].append({n: mask.tolist() for n, mask in allocator.masks.items()})
        if led is not None:
            if step == STEPS - 1:
                path["error"] = said.call_args.args[2]
            path["thresholds"].append(list(led.thresholds.values()))
            path["sparsity"].append(led.sparsity)
        if allocator is not None and step == STEPS // 2:
            state = allocator.state_dict()
            path["allocator"] = copy.deepcopy(state)
            allocator.detach()
            allocator = tokengate.RankAllocator(model, optimizer, total_steps=STEPS)
            allocator.load_state_dict(state)
    return path


def calibrated(engine, **options):
    """The taus that close a half of what was given; the second of two batches is small."""
    model = away_from_initialisation(patched())
    batches = [share(batch(0)), share(batch(1)[:2])]
    if engine:
        tokengate.calibrate(wrapped(model, engine), batches, 0.5, **options)
    else:
        tokengate.calibrate(model, batches, 0.5, **options)
    return taus(model)


def some(name, shape):
    """For `record(groups=...)`: the first samples have a group of their own."""
    first = torch.zeros(shape[0], shape[1:].numel(), dtype=torch.bool)
    first[:1] = name.endswith("q_proj")
    return {f"rank {dist.get_rank() if dist.is_initialized() else '-'}": first, "all": True}


def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except tokengate.TokenGateError as error:
        return str(error)


def reports(engine):
    """What all ranks say together, and what one says alone."""
    found = {}
    model = patched()
    run = wrapped(model, engine)
    everything = {"positions": True, "ratios": True, "groups": some}
    with tokengate.record(model, **everything) as rec, torch.no_grad():
        run(share(batch(0)))
    found["together"] = rec.report(reduce=True).to_dict()
    history = tokengate.History(model)
    history.log(1, loss=torch.tensor(0.5), report=rec.report(reduce=True))
    found["history"] = history.to_dict()
    if engine:
        found["process group"] = rec.report(reduce=dist.group.WORLD).to_dict()
        found["mine"] = rec.report().to_dict()
    found["groups"] = {n: r.to_dict() for n, r in rec.reports(reduce=True).items()}
    found["refused"] = refusal(rec.report, reduce="sum")
    first = not dist.is_initialized() or dist.get_rank() == 0
    with tokengate.record(model, positions=first) as rec, torch.no_grad():
        run(share(batch(0)))
    found["unlike"] = refusal(rec.report, reduce=True)
    return model, run, found


def alone(engine):
    """What one rank asks while the other does not answer, and what both are refused."""
    model, run, found = reports(engine)
    with tokengate.record(model) as rec:
        # A forward of a sharded model is everybody's.
        if engine == "ddp" and dist.get_rank() == 0:
            model(batch(0))
        found["nothing"] = refusal(rec.report)
        found["one ran"] = refusal(rec.report, reduce=True)
        if not found["one ran"]:
            found["one ran"] = rec.report(reduce=True).to_dict()
    dist.barrier()
    if dist.get_rank() == 1:
        found["gate"] = repr(model.blocks[0].q_proj.gate)
        found["sharded"] = hasattr(model.blocks[0].q_proj.gate.tau, "full_tensor")
        with tokengate.record(model) as rec:
            rec._counts = {None: {"blocks.0.q_proj": torch.tensor([1.0, 0.5, 4.0, 2.0])}}
        found["alone"] = rec.report().to_dict()
    dist.barrier()
    found["unpatch"] = refusal(tokengate.unpatch, run)
    if engine == "fsdp2":  # a layer of DDP's does not know what it is in
        found["a part"] = refusal(tokengate.unpatch, model.blocks[0].q_proj)
    found["still"] = len(tokengate.layers(model))
    with tokengate.disabled(model), torch.no_grad():
        found["disabled"] = run(batch(0)).tolist()
    return found


def saved(engine, folder):
    """After some training one ordinary adapter, and what the model that it is of computes."""
    model = patched("dora", train=["head"])
    run = wrapped(model, engine)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-2))
    for step in range(3):
        step_of(run, model, optimizer, batch(step))
    if engine == "fsdp2" or dist.get_rank() == 0:  # sharded by both, of whom the first writes
        tokengate.save(model, folder / "adapter")
    dist.barrier()
    other = wrapped(patched("dora", train=["head"]), engine)
    with torch.no_grad():
        found = {"outputs": run(batch(0)).tolist(), "before": other(batch(0)).tolist()}
        tokengate.load(getattr(other, "module", other), folder / "adapter")
        return found | {"loaded": other(batch(0)).tolist()}


def everything(folder, engine, rank, port):
    join(rank, port)
    found = {}
    for method in METHODS:
        found[method] = training(method, engine)
        found[f"{method} without the unit"] = training(method, engine, unit=False)
    for per_layer in (False, True):
        found[f"per_layer={per_layer}"] = training(
            "lora", engine, schedule={"per_layer": per_layer, "warmup_steps": 2}
        )
    found["bfloat16"] = training("lora", engine, dtype=torch.bfloat16)
    found["checkpointed"] = training("dora", engine, schedule={}, again=True)
    if engine == "fsdp2":
        found["hsdp"] = training("adalora", "hsdp", schedule={})
    if engine == "ddp":
        found["calibrated"] = [calibrated(engine), calibrated(engine, reduce=True)]
    found["TauAdam"] = training("lora", engine, adam=True)
    found["reports"] = alone(engine)
    found["saved"] = saved(engine, folder)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def exported(folder, rank, port):
    """For PEFT, from a sharded model of each of its methods, trained for a step."""
    join(rank, port)
    from tokengate.integrations.hf_peft import export_peft

    found = {}
    for method in METHODS[:3]:
        model = patched(method, train=["head"])
        run = wrapped(model, "fsdp2")
        optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1, s=1e-2))
        step_of(run, model, optimizer, batch(0))
        found[f"refused {method}"] = refusal(export_peft, model, folder / "refused")
        export_peft(model, folder / method, ungated=True)
        for layer in tokengate.layers(model).values():
            torch.nn.init.constant_(layer.gate.tau, -1.0)
        with torch.no_grad():
            found[method] = run(batch(1)).tolist()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def flattened(folder, rank, port):
    """What FSDP1 has divided is refused before anything is written, and saved where it is whole."""
    join(rank, port)
    from tokengate.integrations.hf_peft import export_peft

    found = {}
    for original in (True, False):
        model = patched("adalora", train=["head"])
        if not original:  # where it wants all of a unit trained, or nothing
            model.requires_grad_(True)
        layer = model.blocks[0].q_proj
        options = {"use_orig_params": original, "device_id": torch.device("cpu")}
        model.blocks[0] = FullyShardedDataParallel(model.blocks[0], **options)
        run = FullyShardedDataParallel(model, **options)
        run(share(batch(0))).square().mean().backward()
        seen = found[original] = {"names": list(tokengate.layers(run))}
        seen["whole"] = layer.modification.P.shape == (8, 4)
        place = folder / f"{original}"
        for what, asked in {
            "save": (tokengate.save, run, place),
            "inside": (tokengate.save, model, place),
            "a layer": (tokengate.save, layer, place),
            "export": (export_peft, run, place),
            "calibrate": (tokengate.calibrate, run, [batch(0)]),
            "orthogonality": (tokengate.orthogonality, run),
            "unpatch": (tokengate.unpatch, layer),
        }.items():
            seen[what] = refusal(*asked)
        seen["written"] = place.exists()
        dist.barrier()
        with FullyShardedDataParallel.summon_full_params(run):
            tokengate.save(run, folder / f"{original}-{rank}")
        dist.barrier()
        seen["load"] = refusal(tokengate.load, run, folder / f"{original}-0")
        with FullyShardedDataParallel.summon_full_params(run):
            for parameter in layer.modification.parameters():
                parameter.data.add_(1.0)
            seen["changed"] = layer.modification.P.tolist()
            tokengate.load(run, folder / f"{original}-0")
        with FullyShardedDataParallel.summon_full_params(run), torch.no_grad():
            seen["P"] = layer.modification.P.tolist()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def with_accelerate(folder, rank, port):
    """The loop of docs/distributed.md, under data parallelism and under FSDP2."""
    join(rank, port)
    import accelerate
    from accelerate_state import reset

    from tokengate.integrations.trainer import set_penalty_unit

    found = {}
    for kind in ("ddp", "fsdp2"):
        reset()
        accelerator = accelerate.Accelerator(cpu=True)
        if kind == "fsdp2":
            # Which Accelerate itself reserves for GPUs.
            accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
            )  # fmt: skip
            accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        model = patched()
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-2))
        data = torch.cat([batch(step) for step in range(STEPS)])
        loader = torch.utils.data.DataLoader(data, batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        found[kind] = []
        for x in loader:
            set_penalty_unit(model, accelerator)
            optimizer.zero_grad()
            accelerator.backward(model(x).square().mean())
            accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
            optimizer.step()
            found[kind].append(taus(model).tolist())
        found[f"{kind} is"] = type(model).__name__
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def with_zero(folder, rank, port):
    """DeepSpeed's ZeRO, which clips gradients unless it is told not to."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    join(rank, port)
    import deepspeed

    found = {}
    for stage, methods in ZERO.items():
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
        }
        for method in methods:
            model = patched(method)
            optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-2))
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            tokengate.scale_penalty(model, 2)
            for step in range(ZERO_STEPS):
                engine.backward(engine(share(batch(step))).square().mean())
                engine.step()
            own = [layer.gate.tau for layer in tokengate.layers(model).values()]
            with deepspeed.zero.GatheredParameters(own):
                found[stage, method] = torch.cat(own).tolist()
    for kind in ("RankAllocator", "SparsitySchedule"):
        model = patched("adalora")
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-2))
        if kind == "RankAllocator":
            tokengate.RankAllocator(model, optimizer, total_steps=STEPS)
        else:
            tokengate.SparsitySchedule(model, optimizer, 0.5, STEPS)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(engine(share(batch(0))).square().mean())
        found[kind] = refusal(engine.step)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def an_overflow_on_one_rank(folder, engine, rank, port):
    """The taus after each of three steps, where in the second one rank's gradients are infinite."""
    join(rank, port)
    warnings.simplefilter("ignore", NonFiniteWarning)
    model = patched()
    run = wrapped(model, engine)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-2))
    path = [taus(model)]
    gates = [layer.gate for layer in tokengate.layers(model).values()]
    for step in range(3):
        optimizer.zero_grad()
        if step == 1 and rank == 1:
            for gate in gates:  # whose sum over the open positions overflows
                gate.penalty = 3e38
        run(share(batch(step))).square().mean().backward()
        optimizer.step()
        for gate in gates:
            gate.penalty = 1e-4
        path.append(taus(model))
    skipped = sum(gate.skipped for gate in gates)
    found = {"taus": torch.stack(path), "skipped": skipped}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
