"""What each command of `tokengate` does, given its checked arguments: a text to be printed."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokengate.adapters.destination import check_destination
from tokengate.adapters.difference import difference, difference_text
from tokengate.adapters.folder import SavedAdapter, config_path, read_adapter, read_config
from tokengate.adapters.inspection import describe, description_text
from tokengate.adapters.loading import load
from tokengate.adapters.planning import count_patched, plan_text
from tokengate.adapters.saving import save
from tokengate.errors import TokenGateError
from tokengate.patching.patch import patch
from tokengate.reports.report import SparsityReport

# Of `plan`: what it hands on to `patch` as it is.
_OPTIONS = ("rank", "target_rank", "scale", "alpha", "dropout", "rslora", "activation")


def inspect(given: argparse.Namespace) -> str:
    """What is in an adapter."""
    found = describe(_read(given.folder))
    if _is_peft(given.folder):
        found["saved_by"] = "Hugging Face PEFT, which has no gates"
    return _shown(given, found, description_text)


def diff(given: argparse.Namespace) -> str:
    """What differs between two adapters."""
    found = difference(_read(given.a), _read(given.b))
    return _shown(given, found, difference_text)


def plan(given: argparse.Namespace) -> str:
    """What a patch would change and cost."""
    configs = _integration("model_configs")
    model = configs.build(given.model, given.architecture)
    if given.dtype is not None:
        model.to(getattr(torch, given.dtype))
    targets = configs.roles_of(model, given.roles) if given.roles else given.targets
    patch(
        model,
        targets,
        given.method,
        gate=not given.no_gate,
        train=given.train,
        exclude=given.exclude,
        **{name: getattr(given, name) for name in _OPTIONS if getattr(given, name) is not None},
    )
    return _shown(given, count_patched(model), plan_text)


def export(given: argparse.Namespace) -> str:
    """Write an adapter for PEFT."""
    model = _base(given)
    skipped = load(model, given.folder, strict=not given.no_strict)
    _integration("hf_peft").export_peft(
        model, given.out, ungated=given.ungated, base_model_name=given.base_model_name
    )
    return _written(given.out, "for PEFT", skipped)


def import_(given: argparse.Namespace) -> str:
    """Make PEFT's adapter one of ours."""
    check_destination(Path(given.out), "import")
    model = _base(given)
    skipped = _integration("hf_peft").import_peft(
        model,
        given.folder,
        tau=given.tau,
        penalty=given.penalty,
        gate=not given.no_gate,
        strict=not given.no_strict,
    )
    save(model, given.out)
    return _written(given.out, "for tokengate.load", skipped)


def report(given: argparse.Namespace) -> str:
    """A saved report, as a table, as JSON or as a page."""
    found = SparsityReport.load(given.file)
    if given.html is None:
        return _shown(given, found.to_dict(), lambda _: str(found))
    page = Path(given.html or Path(given.file).with_suffix(".html"))
    if page.exists() and page.samefile(given.file):
        raise TokenGateError(
            f"{str(page)!r} is the report itself, which the page would replace: name another file, "
            "--html PAGE."
        )
    found.to_html(page)
    return f"{page}: written, to be opened in a browser"


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


def _written(out: str, whom: str, skipped: Mapping[str, str]) -> str:
    left = [f"left out: {name} {reason}" for name, reason in skipped.items()]
    return "\n".join([*left, f"{out}: written {whom}"])


def _shown(given: argparse.Namespace, found: dict[str, Any], as_text: Any) -> str:
    if given.json:
        # The one character of ASCII that JSON leaves and a terminal obeys.
        return json.dumps(found, indent=1, allow_nan=False).replace("\x7f", "\\u007f")
    return str(as_text(found))
