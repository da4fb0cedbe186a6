"""A Trainer whose model FSDP2 or DeepSpeed's ZeRO divides over two processes on a CPU, or on one.

Accelerate gives both to GPUs alone. It is told that these are GPUs; all the rest is as on them.
"""

import json
import os
import warnings

import ranks
import torch
import trainer_runs as runs
import transformers

from tokengate.errors import NonFiniteWarning, UnreachedLayerWarning
from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer

METHODS = ["lora", "dora", "adalora", "adapter"]
DIVIDED = ["FSDP2", "ZeRO-3"]
TRAINED = [(engine, method) for engine in DIVIDED for method in METHODS] + [("ZeRO-2", "adalora")]
RESUMED = ["FSDP2", "ZeRO-3"]
WEIGHTS = "adapter_model.safetensors"
STEPS, CLIP = 8, 0.1
KEPT = ("loss", "grad_norm", "sparsity", "tau_mean", "tau_min", "tau_max", "orthogonality")


def as_gpus(rank, port):
    """Be one of two processes that Accelerate takes for GPUs."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    ranks.become(rank, port)
    del os.environ["ACCELERATE_USE_CPU"]
    from accelerate import DistributedType
    from accelerate.state import PartialState

    PartialState._prepare_backend = lambda *a, **k: ("gloo", DistributedType.MULTI_GPU)
    warnings.simplefilter("ignore")
    for category in (UnreachedLayerWarning, NonFiniteWarning):
        warnings.simplefilter("error", category)


def dividing(engine):
    """TrainingArguments."""
    if engine in ("", "DDP"):
        return {}
    if engine == "FSDP2":
        config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
        return {"fsdp": True, "fsdp_config": config, "use_cpu": False}
    zero = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}  # all is divided
    numbers = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = dict.fromkeys((*numbers, "gradient_clipping"), "auto")
    return {"deepspeed": config | {"zero_optimization": zero}, "use_cpu": False}


class Watch(transformers.TrainerCallback):
    """AdaLoRA's masks after each step."""

    def __init__(self, callback):
        self.callback, self.masks = callback, []

    def on_step_end(self, args, state, control, **context):
        allocator = self.callback.allocator
        if allocator is not None:
            self.masks.append({name: mask.tolist() for name, mask in allocator.masks.items()})


def made(folder, engine, method="lora", dropout=0.0, **options):
    """A Trainer, clipped and with weight decay, of eight samples a step; and its watch."""
    more = {"target_rank": 2} if method == "adalora" else {}
    tau = 0.9 if method == "dora" else 0.2
    model = runs.language_model(method, tau=tau, dropout=dropout, **more)
    callback = TokenGateCallback(**({"s": 5e-3} if method == "dora" else {"target_sparsity": 0.6}))
    watch = Watch(callback)
    world = 2 if engine else 1
    options = {
        "per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "logging_steps": 1, "max_grad_norm": CLIP, **options,
    }  # fmt: skip
    trainer, path = runs.trainer(
        folder, model, callback, TokenGateTrainer, [watch], **dividing(engine), **options
    )
    trainer.remove_callback(path)
    return trainer, watch


def history(trainer, watch):
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    schedule = watch.callback.sparsity_schedule
    return {
        "log": [{key: entry.get(key) for key in KEPT} for entry in log],
        "masks": watch.masks,
        "thresholds": schedule and list(schedule.thresholds.values()),
    }


def training(folder, engine, method="lora"):
    """What was logged at every step, and what is left."""
    trainer, watch = made(folder, engine, method)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return history(trainer, watch)


def resumed(folder, engine):
    """All that has a state, without a stop and after one: the same of its last steps."""
    saving = {"dropout": 0.2, "save_strategy": "steps", "save_steps": STEPS // 2}
    found = []
    for name, checkpoint in (("whole", None), ("again", str(folder / f"checkpoint-{STEPS // 2}"))):
        trainer, watch = made(folder, engine, "adalora", **saving)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder / name))
        found.append(history(trainer, watch))
        found[-1]["masks"] = found[-1]["masks"][-STEPS // 2 :]
    return found


def replicated(folder, rank, port):
    """In one process of two, each of which has all of the model."""
    ranks.become(rank, port)
    warnings.simplefilter("ignore")
    (folder / f"rank{rank}.json").write_text(json.dumps(resumed(folder / "resumed", "DDP")))
    torch.distributed.destroy_process_group()


def everything(folder, rank, port):
    """In one process of two."""
    as_gpus(rank, port)
    found = {}
    # A process that has trained with DeepSpeed trains with nothing else.
    for engine in dict.fromkeys(engine for engine, _ in TRAINED):
        for method in (method for each, method in TRAINED if each == engine):
            found[f"{engine} {method}"] = training(folder / engine / method, engine, method)
        if engine in RESUMED:
            found[f"{engine} resumed"] = resumed(folder / engine / "resumed", engine)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
