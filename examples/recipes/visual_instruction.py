"""Section 4.2 of the paper: LLaVA-1.5 on conversations about pictures, gated or not.

    python examples/recipes/visual_instruction.py --train llava_v1_5_mix665k.json --images DATA \\
        --data EVAL --method lora dora adalora --gate off on

The settings are those of the paper's Tables 2 and 7. `--train` is in LLaVA's own format; `--data`
is a folder of the tests as LLaVA has them: `scienceqa` (its questions with a picture), `pope`; and
`easy-vqa`, a small synthetic set that also trains where `--train` is left out. LLaVA-1.5 as its
authors publish it, which the paper names as its base and which is the default, has been trained on
the file above already. `--plan` needs none of it: it says what would be patched and how much memory
that takes. What `recipe.py` says of recipes holds here; in results.json are also every answer, the
other metrics, and the sparsity of every module, of pictures and of text apart. `--fsdp` and
`--deepspeed` divide the model over the GPUs of `torchrun`, by the files beside this one or another.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import recipe
import torch
import visual_data
from forgetting import drifts
from tokenizers import SentencePieceBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from visual_data import Row

from tokengate.integrations.language import PAPER_TARGETS, roles
from tokengate.integrations.llava import PARTS, llava_targets, record_modalities

# Table 2. The paper has no adapter here; it takes LoRA's.
PENALTY = {"lora": 2e-6, "dora": 1e-6, "adalora": 5e-7, "adapter": 2e-6}
LLAVA_1_5_7B = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    ),
    text_config=LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32064,
    ),
)  # fmt: skip


def targets(model: torch.nn.Module, parts: list[str]) -> list[str]:
    """Table 7's layers of the language model; of the other parts, all that has an effect."""
    others = [part for part in parts if part != "language"]
    found = llava_targets(model, others, "all-linear") if others else []
    if "language" in parts:
        found += roles(model, *PAPER_TARGETS["visual_instruction"])
    return found


def pretrained(run: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    """The model and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(run.model, dtype=torch.bfloat16)
    return model, AutoProcessor.from_pretrained(run.model)


def tiny(rows: list[Row]) -> tuple[torch.nn.Module, Any]:
    """A model without any knowledge, and a tokenizer that knows the rows alone."""
    special = ["<unk>", "<s>", "</s>", "<pad>", visual_data.IMAGE]
    pieces = SentencePieceBPETokenizer()
    texts = (turn for row in rows for turn in (visual_data.SYSTEM, "USER: ASSISTANT:", *row.turns))
    pieces.train_from_iterator(texts, vocab_size=500, special_tokens=special, show_progress=False)
    pieces.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, padding_side="left",
        **dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=False)),
    )  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, num_hidden_layers=3, image_size=32, patch_size=16),
        text_config=LlamaConfig(
            **small, num_hidden_layers=2, vocab_size=len(tokenizer), bos_token_id=1,
            eos_token_id=2, pad_token_id=3, initializer_range=0.2,
        ),
        image_token_index=special.index(visual_data.IMAGE),
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def collate(processor: Any, rows: list[Row], train: bool = True) -> Any:
    """A batch of whole conversations with labels, or of first questions.

    As in LLaVA's llava/train/train.py (preprocess_v1), the loss is on the answers alone, each with
    the end of the sequence.
    """
    end = processor.tokenizer.eos_token
    prompts = [visual_data.prompt(row, end) for row in rows]
    grey = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
    images = [visual_data.picture(row, grey) for row in rows if row.image is not None]
    batch = processor(
        text=[text for text, _ in prompts] if train else list(map(visual_data.question, rows)),
        images=images or None, padding=True, truncation=train, max_length=2048 if train else None,
        return_offsets_mapping=train, return_tensors="pt",
    )  # fmt: skip
    batch.pop("token_type_ids", None)
    if train:
        begin, stop = batch.pop("offset_mapping").unbind(-1)
        answered = torch.zeros_like(begin, dtype=torch.bool)
        for i, (_, spans) in enumerate(prompts):
            # A picture, which comes before all answers, is one mark in the text and many tokens.
            marks = int((batch["input_ids"][i] == processor.image_token_id).sum())
            moved = len(processor.image_token) * max(0, marks - 1)
            for first, last in spans:
                answered[i] |= (stop[i] > first + moved) & (begin[i] < last + moved)
        batch["labels"] = batch["input_ids"].masked_fill(~answered, -100)
    return batch


def ask(trainer: Any, processor: Any, rows: list[Row], new_tokens: int) -> tuple[list[str], Any]:
    """What the model answers, all processes together, and this process's recording of questions.

    Sparsity is that of the input (eq. 23), of which each answer is no part; so it is counted apart.
    """
    model, args = trainer.model.eval(), trainer.args
    by_length = sorted(range(len(rows)), key=lambda i: len(visual_data.question(rows[i])))
    mine = by_length[args.process_index :: args.world_size]
    batches = DataLoader(
        [rows[i] for i in mine], 16, collate_fn=partial(collate, processor, train=False),
        num_workers=args.dataloader_num_workers,
    )  # fmt: skip
    answers: list[str] = []
    with torch.inference_mode():
        with record_modalities(model) as rec:
            for batch in batches:
                model(**batch.to(args.device), logits_to_keep=1)
        for batch in batches:
            out = model.generate(
                **batch.to(args.device), max_new_tokens=new_tokens, do_sample=False
            )
            new = out[:, batch["input_ids"].shape[1] :]
            answers += processor.batch_decode(new, skip_special_tokens=True)
    return recipe.in_order(mine, answers), rec


def perform(run: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once."""
    if run.smoke and not run.data:
        train, tests = visual_data.made_up()
    else:
        train, tests = visual_data.load(run.data, run.train, run.images)
    train = train[: run.rows]
    made = partial(tiny, train) if run.smoke else partial(pretrained, run)
    anew = recipe.again(lambda: made()[0])
    model, processor = made()
    recipe.patch(model, targets(model, run.parts), run)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = recipe.fit(
        model, run, train, partial(collate, processor), remove_unused_columns=False,
        # A process whose rows have no picture uses the language model alone.
        ddp_find_unused_parameters=run.parts != ["language"],
        dataloader_num_workers=0 if run.smoke else 4,
    )  # fmt: skip
    recipe.whole(trainer, run, anew)
    names = ("scores", "sparsity", "metrics", "reports", "answers")
    kept: dict[str, Any] = {name: {} for name in names} | {"log": trainer.state.log_history}
    for name, test in tests.items():
        asked = test.asked or len(test.rows)
        if run.smoke:
            test = replace(test, rows=test.rows[:16])
        elif recipe.FIRST and len(test.rows) < asked:
            print(f"{name}: {len(test.rows)} of {asked} questions, whose pictures there are")
        if not test.rows:
            continue
        answers, rec = ask(trainer, processor, test.rows, run.new_tokens)
        metrics = visual_data.score(test, answers)
        reports = {"all": rec.report(reduce=True)} | rec.reports(reduce=True)
        kept["scores"][name] = 100 * metrics[test.metric]
        kept["sparsity"][name] = 100 * reports["all"].sparsity
        kept["metrics"][name] = metrics | {"questions": len(test.rows), "of": asked}
        kept["reports"][name] = {group: each.to_dict() for group, each in reports.items()}
        kept["answers"][name] = answers
        some = [test.rows[at : at + 4] for at in range(0, min(32, len(test.rows)), 4)]
        shown = [dict(collate(processor, rows)) for rows in some]
        for what, drift in drifts(name, trainer.model, shown).items():
            kept.setdefault(what, {}).update(drift)
        for group in ("image", "text"):
            part = kept.setdefault(f"sparsity of {group}", {})
            part[name] = 100 * reports[group].sparsity
    return kept


def without_values(run: argparse.Namespace) -> torch.nn.Module:
    """LLaVA-1.5-7B, patched, for a plan."""
    model = AutoModelForImageTextToText.from_config(LLAVA_1_5_7B, dtype=torch.bfloat16)
    return recipe.patch(model, targets(model, run.parts), run)


def preset(run: argparse.Namespace) -> dict[str, Any]:
    """Table 2's lambda; `--smoke` has other steps, and nothing at random but the rows' order."""
    if run.smoke:
        return {
            "rows": 48, "rank": 4, "s": None, "dropout": 0.0, "lr": 3e-2, "batch_size": 8,
            "epochs": 4, "new_tokens": 4,
        }  # fmt: skip
    return {"penalty": PENALTY[run.method]}


def main() -> None:
    """Every method."""
    options = recipe.options(__doc__)
    recipe.add_dividing(options)
    # Table 7; the warm-up is LLaVA's.
    options.set_defaults(
        rank=128, dropout=0.05, s=4e-5, lr=2e-4, scheduler="cosine", warmup=0.03, epochs=1
    )
    add = options.add_argument
    add("--train", type=Path, help="JSON file of conversations in LLaVA's format")
    add("--images", type=Path, help="where their pictures' names begin, if not beside that file")
    add("--data", type=Path, help="folder of scienceqa, pope, easy-vqa, or of some of them")
    add("--model", default="llava-hf/llava-1.5-7b-hf", help="a folder or a name on the hub")
    add("--parts", nargs="+", default=["language"], choices=PARTS, help="of the model, to modify")
    add("--new-tokens", type=int, default=16, help="of an answer, at most")
    add("--plan", action="store_true", help="what would be done to LLaVA-1.5-7B?")
    runs = recipe.planned(options, preset)
    if runs[0].plan:
        recipe.show_plans(runs, without_values)
    elif not (runs[0].data or runs[0].smoke):
        options.error("--data is needed, or --smoke or --plan")
    else:
        recipe.main(runs, perform)


if __name__ == "__main__":
    main()
