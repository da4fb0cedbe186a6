"""A tiny language model under Hugging Face's Trainer, also for processes of their own."""

import contextlib
import json
import sys
import time

import ranks
import torch
import transformers
from models import away_from_initialisation

import tokengate
from tokengate.integrations.trainer import TokenGateCallback
from tokengate.training import scale_penalty

PADDED = 0


def language_model(method="lora", tau=0.2, penalty=1e-4, **options):
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32, pad_token_id=PADDED, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    options = {"rank": 4, "tau": tau, "penalty": penalty, **options}
    tokengate.patch(model, ["q_proj", "v_proj", "up_proj"], method, **options)
    return away_from_initialisation(model, 0.3)


class Texts(torch.utils.data.Dataset):
    """Sequences of 5 to 8 tokens, padded to 8."""

    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 32, (count, 8), generator=generator)
        lengths = torch.randint(5, 9, (count, 1), generator=generator)
        self.real = torch.arange(8) < lengths
        self.ids[~self.real] = PADDED

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = torch.where(self.real[i], self.ids[i], -100)
        return {"input_ids": self.ids[i], "attention_mask": self.real[i].long(), "labels": labels}


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 8,
        "learning_rate": 1e-2, "logging_steps": 4, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "linear", "weight_decay": 0.1,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **options})


class Path(transformers.TrainerCallback):
    """The taus after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **context):
        self.steps.append(taus(context["model"]))

    def stacked(self):
        return torch.stack(self.steps)


def taus(model):
    gates = [layer.gate for layer in tokengate.layers(model).values()]
    return torch.cat([gate.tau.detach().clone() for gate in gates if gate is not None])


def values(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trainer(folder, model=None, callback=None, kind=transformers.Trainer, more=(), **options):
    """A Trainer with the callback and a `Path`, which is returned with it."""
    path = Path()
    model = language_model() if model is None else model
    callback = TokenGateCallback(s=5e-3) if callback is None else callback
    callbacks = [callback, path, *more] if callback else [path, *more]
    own = {k: options.pop(k) for k in ("optimizers", "eval_dataset") if k in options}
    with contextlib.redirect_stdout(sys.stderr):
        made = kind(
            model, arguments(folder, **options), train_dataset=Texts(), callbacks=callbacks, **own
        )
    made.remove_callback(transformers.PrinterCallback)
    return made, path


def trained(*args, **kwargs):
    """The Trainer after its training, and the taus after each step."""
    made, path = trainer(*args, **kwargs)
    made.train()
    return made, path.stacked()


def hooks(optimizer):
    """Those that are on it, under Accelerate's wrapper."""
    base = optimizer.optimizer
    return [
        *base._optimizer_step_pre_hooks.values(),
        *base._optimizer_step_post_hooks.values(),
        *base._optimizer_state_dict_pre_hooks.values(),
    ]


class Norms(transformers.TrainerCallback):
    """The norm of the adapters' gradients before each step."""

    def __init__(self, seen):
        self.seen = seen

    def on_pre_optimizer_step(self, args, state, control, **context):
        named = context["model"].named_parameters()
        held = [p.grad for n, p in named if p.grad is not None and not n.endswith("tau")]
        self.seen.append(torch.nn.utils.get_total_norm(held).item())


class Scaled(transformers.Trainer):
    """float16 with a GradScaler on the CPU, which Accelerate itself reserves for GPUs."""

    scale, growth = 2.0**12, 2000

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", self.scale, 2.0, 0.5, self.growth)


class Huge(Scaled):
    scale = 2.0**60


def resumable(folder, more=()):
    """All that has a state: dropout, AdaLoRA with its allocator, tau, a schedule, a half epoch."""
    model = language_model("adalora", target_rank=2, dropout=0.2)
    options = {"max_steps": 20, "gradient_accumulation_steps": 2, "warmup_steps": 4}
    saving = {"save_strategy": "steps", "save_steps": 3}
    return trainer(folder, model, more=more, **options, **saving)[0]


class Halt(transformers.TrainerCallback):
    """Says that a step's gradients are there, and waits to be killed."""

    def __init__(self, step, connection):
        self.step, self.connection = step, connection

    def on_pre_optimizer_step(self, args, state, control, **context):
        if state.global_step == self.step:
            self.connection.send("halted")
            time.sleep(600)


# What runs in processes of their own.


def halting(folder, connection):
    torch.set_num_threads(1)
    resumable(folder, more=[Halt(10, connection)]).train()


def ranked(folder, rank, port):
    ranks.become(rank, port)
    found = {}
    for unit in (True, False):
        if not unit:
            scale_penalty.scale_penalty = lambda model, factor: None
        made, path = trainer(folder / str(unit), per_device_train_batch_size=2)
        made.train()
        found[str(unit)] = path.stacked().tolist()
        logged = [entry["sparsity"] for entry in made.state.log_history if "sparsity" in entry]
        found[f"sparsity {unit}"] = logged
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
