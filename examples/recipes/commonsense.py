"""Section 4.1 of the paper: a LLaMA-type model on eight commonsense tasks, gated or not.

    python examples/recipes/commonsense.py --data FOLDER --method lora dora adalora --seed 0 1 2

`FOLDER` holds the tasks as LLM-Adapters (github.com/AGI-Edgerunners/LLM-Adapters) has them in its
`dataset`: piqa/test.json, boolq/test.json... To train on, put its commonsense_170k.json there;
without it every train.json is taken. The defaults are the paper's: LLaMA-3-8B in bfloat16, Table 6,
and s and lambda of Table 1. `s` suits its 32,000 steps: with fewer, pass a larger one.

As there, the loss is of prompt and response, rows are cut off at 256 tokens, and the model answers
in its own words. Here it does so greedily. The sparsity of a test is that of its prompts (eq. 23).

`--plan` shows what would be patched, and the memory it takes. `--random-weights` trains a model
without downloading it, for its speed: `--rows 320 --epochs 1 --test-rows 32` are 20 steps, and
results.json has tokens_per_second, and peak_memory of one GPU's training in bytes. What
`recipe.py` says of recipes holds here.

`--fsdp` and `--deepspeed` divide the model over the GPUs, by the files beside this one or another:

    torchrun --nproc_per_node 8 examples/recipes/commonsense.py --data FOLDER --fsdp
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import commonsense_data as data
import recipe
import torch
from accelerate.utils import gather_object
from commonsense_model import MODEL, config_of, loaded
from forgetting import drifts
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, TrainerCallback

import tokengate
from tokengate.integrations.language import PAPER_TARGETS, roles


class Speed(TrainerCallback):
    """Tokens a second, of all processes and without padding, from the first step's end on."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Note when it was, and how many tokens there have been."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks[1:] = [(time.perf_counter(), state.num_input_tokens_seen)]

    def tokens_per_second(self) -> float | None:
        """None where there was one step alone."""
        if len(self.marks) < 2:
            return None
        (began, before), (ended, after) = self.marks
        return (after - before) / (ended - began)


def encoded(rows: list[data.Row], tokenizer: Any, cutoff: int) -> list[dict[str, list[int]]]:
    """Prompt, response and end as tokens, all of which the loss is of."""
    texts = [data.prompt(row) + row["output"] for row in rows]
    found = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    longer = sum(len(ids) > cutoff for ids in found)
    if longer and recipe.FIRST:
        print(
            f"{longer} of {len(rows)} rows are longer than {cutoff} tokens: their ends, where the "
            "responses are, are cut off. --cutoff changes that."
        )
    return [
        {"input_ids": ids[:cutoff], "attention_mask": [1] * min(len(ids), cutoff),
         "labels": ids[:cutoff]}
        for ids in found
    ]  # fmt: skip


def is_prompt(name: str, shape: torch.Size) -> dict[str, bool]:
    """With a cache, the tokens of a response come one at a time."""
    return {"prompt": shape[-1] > 1}


def evaluate(
    model: Any, tokenizer: Any, name: str, rows: list[data.Row], batch_size: int, rank: int
) -> tuple[Counter[str], tokengate.SparsityReport]:
    """How many rows are "right", "wrong" or have "no answer", and the sparsity of the prompts.

    Every process generates for its share of the batches, which are the same for any number of
    processes, and all get what all found.
    """
    rows = sorted(rows, key=lambda row: len(row["instruction"]), reverse=True)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    found: Counter[str] = Counter()
    model.eval()
    with tokengate.record(model, groups=is_prompt) as rec, torch.no_grad():
        bar = tqdm(batches[rank :: recipe.WORLD], name, disable=rank > 0)
        for batch in bar:
            texts = [data.prompt(row) for row in batch]
            prompts = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
            tokens = model.generate(**prompts)[:, prompts["input_ids"].shape[1] :]
            responses = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for row, response in zip(batch, responses, strict=True):
                answer = data.TASKS[name].answer(response)
                right = "right" if answer == row["answer"] else "wrong"
                found["no answer" if answer is None else right] += 1
    return sum(gather_object([found]), Counter()), rec.reports(reduce=True)["prompt"]


def texts_of(rows: list[data.Row], tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Prompts with the right responses, in batches of eight."""
    texts = [data.prompt(row) + row["output"] for row in rows]
    return [
        dict(tokenizer(texts[at : at + 8], padding=True, return_tensors="pt"))
        for at in range(0, len(texts), 8)
    ]


def perform(run: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if run.data:
        train, tests, missing = data.load(run.data)
        if missing and recipe.FIRST:
            print(f"not found, so that the results are without: {', '.join(missing)}")
    elif run.smoke:
        train, tests = data.made_up()
    else:
        raise SystemExit("pass --data, a folder with the tasks; or --smoke, which needs none.")
    train = data.drawn(train, run.rows)
    anew = recipe.again(lambda: loaded(run, train)[0])
    model, tokenizer = loaded(run, train)
    recipe.patch(model, roles(model, *PAPER_TARGETS["commonsense"]), run)
    if run.gradient_checkpointing:
        # Reentrant, nothing would have a gradient behind the embedding, which is frozen.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    speed = Speed()
    trainer = recipe.fit(
        model, run, encoded(train, tokenizer, run.cutoff), DataCollatorForSeq2Seq(tokenizer),
        callbacks=[speed], include_num_input_tokens_seen="non_padding",
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    model = recipe.whole(trainer, run, anew)
    kept: dict[str, Any] = {
        "scores": {}, "sparsity": {}, "answers": {}, "reports": {},
        "tokens_per_second": speed.tokens_per_second(), "peak_memory": peak,
        "log": trainer.state.log_history,
    }  # fmt: skip
    for name, rows in tests.items():
        rows, rank = data.drawn(rows, run.test_rows), trainer.args.process_index
        found, report = evaluate(model, tokenizer, name, rows, run.test_batch_size, rank)
        kept["scores"][name] = 100 * found["right"] / len(rows)
        kept["sparsity"][name] = 100 * report.sparsity
        kept["answers"][name] = found
        kept["reports"][name] = report.to_dict()
        for what, drift in drifts(name, model, texts_of(rows[:32], tokenizer)).items():
            kept.setdefault(what, {}).update(drift)
    return kept


def without_values(run: argparse.Namespace) -> torch.nn.Module:
    """The model, patched, for a plan."""
    model = AutoModelForCausalLM.from_config(config_of(run), dtype=run.dtype)
    return recipe.patch(model, roles(model, *PAPER_TARGETS["commonsense"]), run)


SMOKE = {
    "rank": 2, "lr": 1e-2, "s": None, "rows": 64, "epochs": 2, "cutoff": 512,
    "test_rows": 8, "test_batch_size": 4, "new_tokens": 8, "dtype": "float32",
}  # fmt: skip


def preset(run: argparse.Namespace) -> dict[str, Any]:
    """Lambda of Table 1, and what `--smoke` chooses."""
    return {"penalty": data.TABLE_1[run.method]} | (SMOKE if run.smoke else {})


def main() -> None:
    """Every method, or their plans."""
    options = recipe.options(__doc__)
    recipe.add_dividing(options)
    add = options.add_argument
    add("--data", type=Path, help="folder of the tasks, or a file to train on beside them")
    add("--model", default=MODEL, help="a folder or a name on the hub")
    add("--dtype", default="bfloat16", help="of the model; modifications are float32")
    add("--random-weights", action="store_true", help="the model's size without its knowledge")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--cutoff", type=int, default=256, help="tokens of a row to train on")
    add("--test-rows", type=int, help="test with so many only")
    add("--test-batch-size", type=int, default=32, help="of a process")
    add("--new-tokens", type=int, default=32, help="of a response, at most")
    add("--plan", action="store_true", help="show what would be done")
    # Tables 1 and 6; warm-up as LLM-Adapters has it, 100 steps of 32,000.
    options.set_defaults(**data.TABLE_6, warmup=0.003)
    runs = recipe.planned(options, preset)
    if runs[0].plan:
        recipe.show_plans(runs, without_values)
    else:
        recipe.main(runs, perform)


if __name__ == "__main__":
    main()
