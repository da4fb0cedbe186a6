"""Look at adapters, plan them and convert them, without a base model; show saved reports."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

import tokengate
from tokengate.arguments import choice, count, finite, non_negative, positive, share
from tokengate.errors import (
    DifferentBaseWarning,
    MixedPositionsWarning,
    RankWarning,
    SkippedModuleWarning,
    TokenGateError,
    printable,
)

# What is imported here is light: who has mistyped an argument does not wait for torch.

_SAID = (DifferentBaseWarning, MixedPositionsWarning, RankWarning, SkippedModuleWarning)
_BASE = "config.json of the base, a folder with one, or timm:NAME"
METHODS = ("adalora", "adapter", "dora", "lora")
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "rank": count,
    "target_rank": partial(count, least=0),
    "scale": positive,
    "alpha": positive,
    "dropout": share,
    "tau": finite,
    "penalty": non_negative,
    "method": partial(choice, choices=METHODS),
}
# Arguments that sentences of the library name, and how one gives them here.
_OPTIONS = {
    "strict=False": "--no-strict",
    "gate=False": "--no-gate",
    "ungated=True": "--ungated",
    "rslora=True": "--rslora",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 2 if it said in one sentence why not."""
    given = parser().parse_args(arguments)
    try:
        _check(given)
        # Everything else waits until the arguments are known to be right.
        run = getattr(importlib.import_module("tokengate.commands"), given.run)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            for kind in _SAID:
                warnings.simplefilter("always", kind)
            text = run(given)
    except (TokenGateError, OSError) as error:
        said = printable(str(error))
        for argument, option in _OPTIONS.items():
            said = said.replace(argument, option)
        _say(f"tokengate {given.command}: {said}", sys.stderr)
        return 2
    for warning in caught:
        said = printable(str(warning.message))
        _say(f"tokengate {given.command}: warning: {said}", sys.stderr)
    try:
        _say(text, sys.stdout)
    except BrokenPipeError:  # as of `| head`, which has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _check(given: argparse.Namespace) -> None:
    for name, check in _CHECKS.items():
        value = getattr(given, name, None)
        if value is not None:
            setattr(given, name, check(name, value))
    for name in ("folder", "file", "a", "b"):
        path = getattr(given, name, None)
        if path is not None and not os.path.exists(path):
            what = "a file that SparsityReport.save" if name == "file" else "a folder that"
            wrote = "wrote" if name == "file" else "tokengate.save or PEFT wrote"
            raise TokenGateError(f"{path!r} does not exist: pass {what} {wrote}.")


def _say(text: str, to: TextIO) -> None:
    """Print it, with characters that the terminal has not as Python writes them."""
    encoding = to.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=to, flush=True)


class _Help(argparse.RawDescriptionHelpFormatter):
    """The default behind each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        # 0 equals False, and is a default.
        if default is None or default is False or default in (argparse.SUPPRESS, []):
            return action.help
        return f"{action.help} (default: {default})"


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    whole = argparse.ArgumentParser(prog="tokengate", description=__doc__)
    whole.add_argument("--version", action="version", version=f"tokengate {tokengate.__version__}")
    commands = whole.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, example: str, **positional: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  tokengate {name} {example}",
            formatter_class=_Help,
        )
        for argument, meaning in positional.items():
            made.add_argument(argument, help=meaning)
        made.set_defaults(run="import_" if name == "import" else name)
        return made

    adapter = "a folder that tokengate.save or PEFT wrote"
    inspect = command("inspect", "what is in an adapter", "my-adapter", folder=adapter)
    diff = command(
        "diff", "what differs between two adapters", "before after", a=adapter, b=adapter
    )
    plan = command(
        "plan",
        "what a patch would change and cost",
        "timm:vit_base_patch16_224 --roles q v --rank 32",
        model=_BASE,
    )
    report = command(
        "report",
        "a report that SparsityReport.save wrote, as a table or a page",
        "report.json --html",
        file="the JSON file",
    )
    form = report.add_mutually_exclusive_group()
    for each in (inspect, diff, plan, form):
        each.add_argument("--json", action="store_true", help="everything, as JSON")
    form.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="PAGE",
        help="write a page instead, by default beside the file, with the suffix .html",
    )

    targets = plan.add_mutually_exclusive_group(required=True)
    targets.add_argument("--targets", nargs="+", help='names or globs, or "all-linear"')
    targets.add_argument("--roles", nargs="+", help="e.g. q v, as the integrations name them")
    plan.add_argument("--method", default="lora", help=", ".join(METHODS))
    plan.add_argument("--train", nargs="+", default=[], help="other parameters to train")
    plan.add_argument("--exclude", nargs="+", help="layers to leave out")
    plan.add_argument("--no-gate", action="store_true", help="modify every position")
    plan.add_argument("--rank", type=int, help="(default: lora 8, adalora 12, adapter 32)")
    plan.add_argument("--target-rank", type=int, help="of adalora (default: half of --rank)")
    plan.add_argument("--scale", type=float, help="of the method (default: 0.5)")
    plan.add_argument("--alpha", type=float, help="instead: scale = alpha / rank")
    plan.add_argument("--rslora", action="store_true", default=None, help="alpha / sqrt(rank)")
    plan.add_argument("--dropout", type=float, help="of the method (default: 0)")
    plan.add_argument("--activation", help="of adapter (default: relu)")
    plan.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the base's values (default: the configuration's, or else float32)",
    )

    out = "folder to write"
    export = command(
        "export", "write an adapter for PEFT", "ours theirs --base base/config.json",
        folder="a folder that tokengate.save wrote", out=out,
    )  # fmt: skip
    export.add_argument("--ungated", action="store_true", help="leave out gates that may close")
    export.add_argument("--base-model-name", help="what PEFT's AutoPeftModel shall load")
    convert = command(
        "import", "make PEFT's adapter one of ours", "theirs ours --base base/config.json",
        folder="a folder that PEFT's save_pretrained wrote", out=out,
    )  # fmt: skip
    convert.add_argument("--tau", type=float, default=0.0, help="of every layer")
    convert.add_argument("--penalty", type=float, default=1e-5, help="lambda of every layer")
    convert.add_argument("--no-gate", action="store_true", help="modify every position")
    for each in (export, convert):
        each.add_argument("--base", required=True, metavar="MODEL", help=_BASE)
        each.add_argument("--no-strict", action="store_true", help="leave out what does not fit")
    for each in (plan, export, convert):
        each.add_argument("--architecture", help="class of transformers (default: the config's)")
    return whole


if __name__ == "__main__":
    sys.exit(main())
