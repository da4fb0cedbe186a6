"""The command `tokengate`: look at adapters, plan them, and convert them, without a base model."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tokengate.adapters.destination import check_destination
from tokengate.adapters.difference import difference, difference_text
from tokengate.adapters.folder import SavedAdapter, config_path, read_adapter, read_config
from tokengate.adapters.inspection import describe, description_text
from tokengate.adapters.loading import load
from tokengate.adapters.planning import count_patched, plan_text
from tokengate.adapters.saving import save
from tokengate.errors import (
    DifferentBaseWarning,
    MixedPositionsWarning,
    SkippedModuleWarning,
    TokenGateError,
    printable,
)
from tokengate.patching.patch import patch

_BASE = "config.json of the base, a folder with one, or timm:NAME"
# Of `plan`: what it hands on to `patch` as it is.
_NUMBERS = {"rank": int, "target_rank": int, "scale": float, "alpha": float, "dropout": float}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 2 if it said in one sentence why not."""
    given = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            for kind in (DifferentBaseWarning, MixedPositionsWarning, SkippedModuleWarning):
                warnings.simplefilter("always", kind)
            text = given.run(given)
    except (TokenGateError, OSError) as error:
        _say(f"tokengate {given.command}: {printable(str(error))}", sys.stderr)
        return 2
    for warning in caught:
        said = printable(str(warning.message))
        _say(f"tokengate {given.command}: warning: {said}", sys.stderr)
    try:
        _say(text, sys.stdout)
    except BrokenPipeError:  # as of `| head`, which has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _say(text: str, to: TextIO) -> None:
    """Print it, with characters that the terminal has not as Python writes them."""
    encoding = to.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=to, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokengate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, help: str, **positional: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        for argument, meaning in positional.items():
            made.add_argument(argument, help=meaning)
        made.set_defaults(run=run)
        return made

    adapter = "a folder that tokengate.save or PEFT wrote"
    inspect = command("inspect", _inspect, "what is in an adapter", folder=adapter)
    diff = command("diff", _diff, "what differs between two adapters", a=adapter, b=adapter)
    plan = command("plan", _plan, "what a patch would change and cost", model=_BASE)
    for each in (inspect, diff, plan):
        each.add_argument("--json", action="store_true", help="everything, as JSON")

    targets = plan.add_mutually_exclusive_group(required=True)
    targets.add_argument("--targets", nargs="+", help='names or globs, or "all-linear"')
    targets.add_argument("--roles", nargs="+", help="e.g. q v, as the integrations name them")
    plan.add_argument("--method", default="lora", help="lora, dora, adalora or adapter")
    plan.add_argument("--train", nargs="+", default=[], help="other parameters to train")
    plan.add_argument("--exclude", nargs="+", help="layers to leave out")
    plan.add_argument("--no-gate", action="store_true", help="modify every position")
    plan.add_argument("--activation", help="of adapter")
    plan.add_argument("--rslora", action="store_true", default=None, help="with --alpha")
    for option, kind in _NUMBERS.items():
        plan.add_argument(f"--{option.replace('_', '-')}", type=kind, help="of the method")

    out = "folder to write"
    export = command("export", _export, "write an adapter for PEFT", folder=adapter, out=out)
    export.add_argument("--ungated", action="store_true", help="leave out gates that may close")
    export.add_argument("--base-model-name", help="what PEFT's AutoPeftModel shall load")
    peft_folder = "a folder that PEFT's save_pretrained wrote"
    convert = command(
        "import", _import, "make PEFT's adapter one of ours", folder=peft_folder, out=out
    )
    convert.add_argument("--tau", type=float, default=0.0, help="of every layer")
    convert.add_argument("--penalty", type=float, default=1e-5, help="lambda of every layer")
    convert.add_argument("--no-gate", action="store_true", help="modify every position")
    for each in (export, convert):
        each.add_argument("--base", required=True, metavar="MODEL", help=_BASE)
    for each in (plan, export, convert):
        each.add_argument("--architecture", help="class of transformers, if not the config's own")
    return parser


def _inspect(given: argparse.Namespace) -> str:
    found = describe(_read(given.folder))
    if _is_peft(given.folder):
        found["saved_by"] = "Hugging Face PEFT, which has no gates"
    return _shown(given, found, description_text)


def _diff(given: argparse.Namespace) -> str:
    found = difference(_read(given.a), _read(given.b))
    return _shown(given, found, difference_text)


def _plan(given: argparse.Namespace) -> str:
    configs = _integration("model_configs")
    model = configs.build(given.model, given.architecture)
    targets = given.targets
    if given.roles:
        targets = configs.roles_of(model, given.roles)
    elif targets == ["all-linear"]:
        targets = "all-linear"
    names = [*_NUMBERS, "rslora", "activation"]
    options = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    patch(
        model,
        targets,
        given.method,
        gate=not given.no_gate,
        train=given.train,
        exclude=given.exclude,
        **options,
    )
    return _shown(given, count_patched(model), plan_text)


def _export(given: argparse.Namespace) -> str:
    model = _base(given)
    load(model, given.folder)
    _integration("hf_peft").export_peft(
        model, given.out, ungated=given.ungated, base_model_name=given.base_model_name
    )
    return f"{given.out}: written for PEFT"


def _import(given: argparse.Namespace) -> str:
    out = Path(given.out)
    check_destination(out, "import")
    model = _base(given)
    options = {"tau": given.tau, "penalty": given.penalty, "gate": not given.no_gate}
    _integration("hf_peft").import_peft(model, given.folder, **options)
    save(model, out)
    return f"{given.out}: written for tokengate.load"


def _base(given: argparse.Namespace) -> Any:
    return _integration("model_configs").build(given.base, given.architecture)


def _read(folder: str) -> SavedAdapter:
    if _is_peft(folder):
        saved: SavedAdapter = _integration("hf_peft").read_saved(folder)
        return saved
    return read_adapter(folder)


def _is_peft(folder: str) -> bool:
    config = config_path(Path(folder))
    return config.exists() and "peft_type" in read_config(config)


def _integration(name: str) -> Any:
    # The library imports no integration, which all import it. A command is where both meet: it
    # looks for the one it needs when it is run.
    return importlib.import_module(f"tokengate.integrations.{name}")


def _shown(given: argparse.Namespace, found: dict[str, Any], as_text: Any) -> str:
    if given.json:
        # The one character of ASCII that JSON leaves and a terminal obeys.
        return json.dumps(found, indent=1, allow_nan=False).replace("\x7f", "\\u007f")
    return str(as_text(found))


if __name__ == "__main__":
    sys.exit(main())
