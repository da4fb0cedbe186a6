"""The page of `SparsityReport.to_html`: one file with all that it needs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from tokengate.errors import TokenGateError, brief
from tokengate.reports.module_sparsity import ModuleSparsity
from tokengate.reports.page.sample_views import PatchView, TokenView
from tokengate.reports.sparsity_table import value


def html_page(
    title: str,
    averages: Mapping[str, float | None],
    modules: Mapping[str, ModuleSparsity],
    places: Mapping[str, tuple[str, str]],
    *,
    row_averages: Sequence[float | None],
    column_averages: Sequence[float | None],
    texts: Sequence[TokenView],
    images: Sequence[PatchView],
) -> str:
    """The whole page.

    Args:
        title: of the page.
        averages: "sparsity", "std" and "token_sparsity" of the report.
        modules: those of the report.
        places: row and column of each module in the report's table, whose averages the next two
            are.
        row_averages, column_averages: sparsities in [0, 1]; None where there is none.
        texts, images: samples to show.

    Raises:
        TokenGateError: a sample is no view of one, or has a module that the report has not.
    """
    _check_views("texts", texts, TokenView, places)
    _check_views("images", images, PatchView, places)
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    columns = list(dict.fromkeys(column for _, column in places.values()))
    order = {name: number for number, name in enumerate(places)}
    views = [view.data(order) for view in texts] + [view.data(order) for view in images]
    data = {
        "rows": rows,
        "columns": columns,
        "row_averages": row_averages,
        "column_averages": column_averages,
        "sparsity": averages["sparsity"],
        "modules": [
            {
                "name": name,
                "row": rows.index(row),
                "column": columns.index(column),
                # Not what is known by sample and by place, which may be much.
                "sparsity": value(modules[name].sparsity),
                "samples": modules[name].samples,
                "positions": modules[name].positions,
                "modified": modules[name].modified,
                "tau": _tau(modules[name].tau),
            }
            for name, (row, column) in places.items()
        ],
        "views": views,
    }
    style, script = _part("css"), _part("js")
    # Nothing runs and nothing is loaded but what is here, whatever a token or a name holds.
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_part("html")).substitute(
        policy=policy,
        title=escape(title),
        style=style,
        script=script,
        figures=_figures(averages, modules.values()),
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


def _figures(averages: Mapping[str, float | None], modules: Collection[ModuleSparsity]) -> str:
    """What stands above all: three numbers, with a few words on each."""
    uncalled = sum(not module.samples for module in modules)
    positions = sum(module.positions for module in modules)
    unmodified = positions - sum(module.modified for module in modules)
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
        f"<div><dt>{what}</dt><dd>{number}</dd><dd>{words}</dd></div>"
        for what, number, words in figures
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _tau(tau: float | None) -> str | None:
    # As it is to be read: a broken one may be NaN, which JSON has not.
    return None if tau is None else f"{tau:.4g}"


def _part(kind: str) -> str:
    return files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
