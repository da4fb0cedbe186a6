"""What the recipes share: one command trains every combination of its options, once.

    python RECIPE.py --method lora dora --gate off on 0.6 --seed 0 1 2 --output FOLDER

Each combination is a run with a folder of its own in `--output`: results.json, the adapter, and
until it is done begun.json and its checkpoints. A run that has results is not repeated, and one
that was interrupted goes on at its last checkpoint, if it was begun with the same settings. Then
table.md and results.png are written. The same command after `torchrun --nproc_per_node N` or
`accelerate launch` trains on N processes, with the same number of samples in each step; with
`--fsdp` or `--deepspeed`, where a recipe has them, these divide one model among themselves.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import recipe_results
import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import tokengate
from tokengate.adapters.planning import count_patched, plan_text
from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer
from tokengate.integrations.trainer.checkpoints import is_whole
from tokengate.integrations.trainer.engines import sharding_of
from tokengate.sharding import is_divided

METHODS = ["lora", "dora", "adalora", "adapter"]
FIRST = int(os.environ.get("RANK", 0)) == 0
WORLD = int(os.environ.get("WORLD_SIZE", 1))
# Of TrainingArguments. Without being told, they find their neighbours on GPUs alone.
HARDWARE = {
    "use_cpu": WORLD > 1 and not torch.cuda.is_available(),
    "dataloader_pin_memory": torch.cuda.is_available(),
}
FILES = ("results.json", "begun.json")  # of a run that is done, and that is not
# Where results lie and how they came about, which is not what they are of.
BESIDE = (
    "output", "folder", "checkpoint_every", "accumulate", "report_to", "fsdp", "deepspeed",
)  # fmt: skip


def options(doc: str | None, axes: Iterable[str] = ("method", "gate", "seed")) -> Any:
    """A parser with the options of all recipes; of those in `axes` each run has one value."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(axes=tuple(axes))
    add = parser.add_argument
    add("--method", nargs="+", default=["lora"], choices=METHODS, help="one or several")
    add(
        "--gate",
        nargs="+",
        default=["off", "on"],
        type=gate,
        help="off, on, or a sparsity to reach",
    )
    add("--seed", nargs="+", default=[0], type=int, help="one or several")
    add("--rank", type=int, default=8, help="AdaLoRA's last, an adapter's width")
    add("--scale", type=float, default=0.5, help="of the modification")
    add("--dropout", type=float, default=0.0, help="of its input")
    add("--penalty", type=float, default=1e-5, help="lambda; where --gate is a number, the first")
    add("--s", type=float, help="of eq. 11; by default 2 / steps, of the median of r")
    add("--hold-tau", type=float, default=0.0, help="at 0 for this share of a number's steps")
    add("--lr", type=float, default=1e-3, help="of the modifications, at its highest")
    add("--scheduler", default="linear", help="of transformers, after a warm-up")
    add("--warmup", type=float, default=0.06, help="share of the steps")
    add("--batch-size", type=int, default=16, help="of a step, over all processes")
    add("--accumulate", type=int, default=1, help="micro-batches a step")
    add("--epochs", type=float, default=3)
    add("--rows", type=int, help="train on so many only")
    add("--checkpoint-every", type=int, default=500, help="steps")
    add("--report-to", default="none", help="tensorboard, wandb")
    add("--output", type=Path, default=Path("outputs") / parser.prog.removesuffix(".py"))
    add("--smoke", action="store_true", help="does it run? A tiny model, few rows")
    return parser


def add_dividing(parser: argparse.ArgumentParser) -> None:
    """`--fsdp` and `--deepspeed`, for recipes of models that do not fit on one GPU."""
    here = Path(__file__).parent
    add = parser.add_mutually_exclusive_group().add_argument
    for name, file in (("fsdp", "fsdp.json"), ("deepspeed", "zero3.json")):
        what = f"divide the model over the processes, as this or examples/recipes/{file} says"
        add(f"--{name}", nargs="?", const=here / file, type=Path, help=what)


def gate(text: str) -> str:
    """Off, on or a number, as the command line has it."""
    if text not in ("off", "on"):
        try:
            reachable = 0 < float(text) < 1
        except ValueError:
            reachable = False
        if not reachable:
            raise argparse.ArgumentTypeError(f"{text} is not off, on or a sparsity within 0 and 1")
    return text


def planned(
    parser: argparse.ArgumentParser,
    preset: Callable[[argparse.Namespace], dict[str, Any]] = lambda run: {},
) -> list[argparse.Namespace]:
    """The options of every run: what was given, before what `preset` has, before the defaults."""
    args = vars(parser.parse_args())
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    given = vars(parser.parse_args())
    axes = args.pop("axes")
    runs = []
    for values in itertools.product(*(dict.fromkeys(args[axis]) for axis in axes)):
        own = dict(zip(axes, values, strict=True))
        chosen = preset(argparse.Namespace(**(args | own)))
        run = argparse.Namespace(**(args | chosen | given | own))
        run.folder = run.output / "-".join(map(str, values))
        runs.append(run)
    return runs


def patch(model: nn.Module, targets: Any, run: argparse.Namespace, **more: Any) -> nn.Module:
    """`tokengate.patch` by the run's options."""
    # Of its target rank AdaLoRA has nothing to choose from: it starts at twice, as in section 4.1.
    twice = {"rank": 2 * run.rank, "target_rank": run.rank}
    return tokengate.patch(
        model,
        targets,
        method=run.method,
        gate=run.gate != "off",
        penalty=run.penalty,
        scale=run.scale,
        dropout=run.dropout,
        **(twice if run.method == "adalora" else {"rank": run.rank}),
        **more,
    )


def fit(
    model: nn.Module,
    run: argparse.Namespace,
    train: Sized,
    collate: Any,
    callbacks: Iterable[TrainerCallback] = (),
    kind: type[TokenGateTrainer] = TokenGateTrainer,
    **more: Any,
) -> TokenGateTrainer:
    """Train from the beginning or the last checkpoint; `more` are further TrainingArguments."""
    gpus = torch.cuda.device_count()
    if gpus > 1 and "LOCAL_RANK" not in os.environ:  # the Trainer would give a whole batch to each
        raise SystemExit(
            f"{gpus} GPUs are there for one process: start the recipe with torchrun "
            f"--nproc_per_node {gpus}, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    share, left = divmod(run.batch_size, WORLD * run.accumulate)
    if left or not share:
        raise SystemExit(
            f"--batch-size {run.batch_size} is no multiple of {WORLD} processes x {run.accumulate} "
            "micro-batches: change one of them."
        )
    steps = math.ceil(math.ceil(len(train) / run.batch_size) * run.epochs)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": share,
        "gradient_accumulation_steps": run.accumulate,
        "num_train_epochs": run.epochs,
        "learning_rate": run.lr,
        "lr_scheduler_type": run.scheduler,
        "warmup_steps": int(run.warmup * steps),
        "seed": run.seed,
        "save_steps": run.checkpoint_every,
        "save_total_limit": 1,
        "logging_steps": max(1, min(50, steps // 10)),
        "report_to": run.report_to,
        **HARDWARE,
        **dividing(run),
    }
    led: dict[str, Any] = {}
    if run.gate not in ("off", "on"):
        led = {"target_sparsity": float(run.gate), "target_warmup": run.hold_tau}
    trainer = kind(
        model,
        TrainingArguments(str(run.folder), **(settings | more)),
        train_dataset=train,
        data_collator=collate,
        callbacks=[
            TokenGateCallback(s=run.s, **led),
            *callbacks,
        ],
    )
    if dividing(run) and not sharding_of(trainer.accelerator):
        raise SystemExit(
            "--fsdp and --deepspeed divide a model over GPUs: start the recipe with torchrun "
            "--nproc_per_node N on as many as N, 2 or more."
        )
    trainer.train(resume_from_checkpoint=last_checkpoint(run.folder))
    if FIRST or is_divided(model.parameters()):  # of which each process has a part
        tokengate.save(model, run.folder / "adapter")
    return trainer


def dividing(run: argparse.Namespace) -> dict[str, Any]:
    """TrainingArguments of `--fsdp` or `--deepspeed`."""
    if getattr(run, "fsdp", None):
        return {"fsdp": True, "fsdp_config": str(run.fsdp), "use_cpu": False}
    if getattr(run, "deepspeed", None):
        return {"deepspeed": str(run.deepspeed), "use_cpu": False}
    return {}


def whole(
    trainer: TokenGateTrainer, run: argparse.Namespace, made: Callable[[], nn.Module]
) -> nn.Module:
    """The trained model for tests, of which each process does its share; `made` makes its base.

    A divided one would want of every process as many batches as of the others.
    """
    if not is_divided(trainer.model.parameters()):
        return trainer.model
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.deepspeed = None
    unset_hf_deepspeed_config()  # or transformers would divide this one, too
    gc.collect()
    torch.distributed.barrier()
    model = made()
    tokengate.load(model, run.folder / "adapter")
    trainer.model = trainer.model_wrapped = model.to(trainer.args.device)
    return trainer.model


def again(made: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`made`, with the random numbers that it is going to find now."""
    cpu, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def make() -> nn.Module:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpus)
        return made()

    return make


@torch.no_grad()
def predict(trainer: Trainer, rows: Sequence[Any], collate: Any) -> Tensor:
    """The model's logits for each row, `(rows, classes)`, on all processes.

    Every row is computed once. The Trainer's own `predict` repeats some where they do not divide
    evenly among the processes, and what records sparsity around it would count these twice.
    """
    model, args = trainer.model.eval(), trainer.args
    mine = range(args.process_index, len(rows), args.world_size)
    batches = DataLoader(
        Subset(rows, mine), args.per_device_eval_batch_size, collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )  # fmt: skip
    found: list[np.ndarray] = []  # rows of a tensor would be sent with their whole batch
    for batch in tqdm(batches, "predict", disable=not FIRST):
        on_device = {name: value.to(args.device) for name, value in batch.items()}
        found.extend(model(**on_device)["logits"].float().cpu().numpy())
    return torch.from_numpy(np.stack(in_order(mine, found)))


def in_order(numbers: Iterable[int], found: Iterable[Any]) -> list[Any]:
    """What all processes found, each of the rows of its numbers, in the rows' order."""
    of_all = dict(gather_object(list(zip(numbers, found, strict=True))))
    return [of_all[number] for number in sorted(of_all)]


def last_checkpoint(folder: Path) -> str | None:
    """The last that was saved to the end; None where there is none, or only one that was not."""
    whole = filter(is_whole, folder.glob("checkpoint-*"))
    last = max(whole, key=lambda place: int(place.name.split("-")[1]), default=None)
    return last and str(last)


def main(
    runs: list[argparse.Namespace], perform: Callable[[argparse.Namespace], dict[str, Any]]
) -> None:
    """Do what is missing of the runs, then print the table and draw it.

    Args:
        runs: of `planned`.
        perform: trains and evaluates one run, and returns `scores`, percentages by the name of a
            test, `sparsity`, percentages by the same names, and whatever else is to be kept. What
            begins with `sparsity`, such as `sparsity of image`, is like it and is shown below it;
            so is what begins with `drift`, in nats or cosine, of every run.
            Scores that are no percentages say how many `decimals` they have.
    """
    for run in runs:
        check(run)
    found = []
    for number, run in enumerate(runs, 1):
        done, begun = (run.folder / name for name in FILES)
        if not done.exists():
            if FIRST:
                print(f"\nrun {number} of {len(runs)}: {run.folder.name}", flush=True)
                recipe_results.keep_text(begun, json.dumps({"settings": plain(run)}))
            gc.collect()  # a Trainer and its model, or there would be two of them
            began = time.perf_counter()
            set_seed(run.seed)
            try:
                kept = perform(run)
            except BaseException as why:
                if FIRST and not last_checkpoint(run.folder):
                    begun.unlink(missing_ok=True)  # there is nothing that could be gone on with
                if isinstance(why, tokengate.TokenGateError | FileNotFoundError):
                    raise SystemExit(f"{run.folder.name}: {why}") from why
                raise
            seconds = time.perf_counter() - began
            kept |= {"settings": plain(run), "seconds": seconds, "on": machine()}
            if FIRST:
                recipe_results.keep_text(done, json.dumps(kept, indent=1))
        else:
            kept = json.loads(done.read_text())
        if FIRST:  # also what was left behind between the results and this
            begun.unlink(missing_ok=True)
            for checkpoint in run.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        found.append(kept)
    if FIRST:
        print("\n" + recipe_results.write(found, runs[0].output))


def check(run: argparse.Namespace) -> None:
    """Refuse a folder with the results, or the checkpoints, of other settings."""
    for file in (run.folder / name for name in FILES):
        if file.exists():
            asked, had = plain(run), json.loads(file.read_text())["settings"]
            other = [name for name in asked | had if asked.get(name) != had.get(name)]
            if other:
                raise SystemExit(
                    f"{file} is of other settings ({', '.join(other)}) than were asked: pass "
                    "another --output, or the settings that it has."
                )


def show_plans(
    runs: list[argparse.Namespace], patched: Callable[[argparse.Namespace], nn.Module]
) -> None:
    """What each run patches and the memory it takes, by a model without values."""
    for run in (each for each in runs if each.seed == runs[0].seed):
        with torch.device("meta"):
            model = patched(run)
        print(f"{run.folder.name}\n{plan_text(count_patched(model))}\n")


def plain(run: argparse.Namespace) -> dict[str, Any]:
    """What the results are of, as JSON has it."""
    return {
        name: value if isinstance(value, bool | int | float | None) else str(value)
        for name, value in vars(run).items()
        if name not in BESIDE
    }


def machine() -> dict[str, Any]:
    """Where a run was done."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "processes": WORLD,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
