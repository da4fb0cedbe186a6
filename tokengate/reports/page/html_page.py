"""The page of `SparsityReport.to_html`: one file with all that it needs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from tokengate.errors import TokenGateError, brief, printable
from tokengate.reports.page.report_data import Shown, report_data
from tokengate.reports.page.sample_views import PatchView, TokenView
from tokengate.reports.tables.sparsity_table import places


def html_page(
    title: str, reports: Sequence[Shown], texts: Sequence[TokenView], images: Sequence[PatchView]
) -> str:
    """The whole page.

    Args:
        title: of the page.
        reports: one, or two side by side.
        texts, images: samples to show, of modules of these reports.

    Raises:
        TokenGateError: a sample is no view of one, or has a module that no report has.
    """
    at = places(dict.fromkeys(name for report in reports for name in report.modules))
    _check_views("texts", texts, TokenView, at)
    _check_views("images", images, PatchView, at)
    rows = list(dict.fromkeys(row for row, _ in at.values()))
    columns = list(dict.fromkeys(column for _, column in at.values()))
    order = {name: number for number, name in enumerate(at)}
    views = [view.data(order) for view in texts] + [view.data(order) for view in images]
    data = {
        "rows": rows,
        "columns": columns,
        "modules": [
            {"name": name, "row": rows.index(row), "column": columns.index(column)}
            for name, (row, column) in at.items()
        ],
        "reports": [report_data(report, at) for report in reports],
        "views": views,
    }
    style, script = _part("css"), _part("js")
    # Nothing runs and nothing is loaded but what is here, whatever a token or a name holds.
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_text("page.html")).substitute(
        policy=policy,
        title=escape(title),
        about="\n".join(_about(report, len(reports) > 1) for report in reports),
        style=style,
        script=script,
        figures="\n".join(_figures(report, len(reports) > 1) for report in reports),
        # No end of the script, and no comment, can begin in it.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _check_views(argument: str, views: Any, kind: type, known: Collection[str]) -> None:
    if not isinstance(views, Sequence):
        raise TokenGateError(
            f"{argument}={brief(views)} is no list: pass a list of tokengate.{kind.__name__}."
        )
    for i, view in enumerate(views):
        if not isinstance(view, kind):
            raise TokenGateError(
                f"{argument}[{i}]={brief(view)} is no {kind.__name__}: pass a list of "
                f"tokengate.{kind.__name__}."
            )
        unknown = [name for name in view.is_open if name not in known]  # type: ignore[attr-defined]
        if unknown:
            raise TokenGateError(
                f"{argument}[{i}] has {unknown[0]!r}, which is no module of this report: pass a "
                "sample of the model that was reported on."
            )


def _about(report: Shown, several: bool) -> str:
    """A line on where the report comes from; nothing where that is not known."""
    name = f"<b>{escape(printable(report.name))}</b> " if several else ""
    said = " ".join(
        f"<span>{escape(what)} <b>{escape(printable(words))}</b></span>"
        for what, words in report.about.items()
    )
    return f'<p class="about">{name}{said}</p>' if name or said else ""


def _figures(report: Shown, several: bool) -> str:
    """What stands above all: three numbers, with a few words on each."""
    modules, averages = report.modules.values(), report.averages
    uncalled = sum(not module.samples for module in modules)
    positions = sum(module.positions for module in modules)
    unmodified = positions - sum(module.modified for module in modules)
    name = f"{escape(printable(report.name))}: " if several else ""
    figures = [
        (
            "sparsity",
            _percent(averages["sparsity"]),
            f"mean over modules, standard deviation {_percent(averages['std'])}",
        ),
        (
            "positions left unmodified",
            _percent(averages["token_sparsity"]),
            f"{unmodified:,} of {positions:,}, all modules together",
        ),
        (
            "modules",
            f"{len(modules):,}",
            f"{uncalled:,} of them never called" if uncalled else "all of them called",
        ),
    ]
    return "\n".join(
        f"<div><dt>{name}{what}</dt><dd>{number}</dd><dd>{words}</dd></div>"
        for what, number, words in figures
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _part(kind: str) -> str:
    """The files of a kind, one after the other, in the order of their names."""
    found = (each.name for each in files(__package__).iterdir())
    return "\n".join(_text(name) for name in sorted(found) if name.endswith(f".{kind}"))


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
