"""Reports on disk: JSON, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokengate.errors import TokenGateError
from tokengate.files.atomic_write import write_text
from tokengate.files.strict_json import read
from tokengate.reports.module_sparsity import ModuleSparsity, module_from_dict

_FORMAT = "tokengate report"
_VERSION = 1


def write_report(path: str | Path, found: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """What `SparsityReport.to_dict` gave, and what the report is of."""
    head = {"format": _FORMAT, "format_version": _VERSION, "about": dict(about)}
    write_text(path, json.dumps({**head, **found}, allow_nan=False))


def read_report(path: str | Path) -> tuple[dict[str, ModuleSparsity], dict[str, str]]:
    """The modules of a report, and what it is of: nothing, where an earlier version wrote it.

    Raises:
        TokenGateError: the file cannot be read, or holds something else.
    """
    found = read(path, "report")
    about = found.get("about", {})
    is_report = found.get("format") == _FORMAT and isinstance(found.get("modules"), dict)
    said = isinstance(about, dict) and all(isinstance(each, str) for each in about.values())
    if not (is_report and said) or found.get("format_version") != _VERSION:
        raise TokenGateError(
            f"{path} is no report of version {_VERSION}: pass a file that SparsityReport.save "
            "wrote."
        )
    modules = {}
    for name, module in found["modules"].items():
        try:
            modules[name] = module_from_dict(module)
        except ValueError as error:
            raise TokenGateError(
                f"{path} is broken at module {name!r}, as {error}: save the report again."
            ) from None
    return modules, about
