"""A heatmap as an HTML table of its own, for notebooks: no script, no style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tokengate.errors import printable

# sRGB at 0 and at 1: light to deep blue. From `_DARK` on, white stands out more than black.
_LOW, _HIGH, _DARK = (236, 243, 250), (8, 62, 120), 0.68


def html_table(
    columns: Sequence[str],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
) -> str:
    """`values` in [0, 1] give the colours of a `rows` x `columns` table, `texts` what is in it.

    Headings and cells without a value keep the colours of the notebook, light or dark.
    """
    head = "".join(f'<th scope="col">{escape(printable(name))}</th>' for name in columns)
    lines = [f"<tr><th>layer</th>{head}</tr>"]
    for name, shares, words in zip(rows, values, texts, strict=True):
        cells = "".join(map(_cell, shares, words))
        lines.append(f'<tr><th scope="row">{escape(printable(name))}</th>{cells}</tr>')
    # Where a page does not say which HTML it is, tables inherit no colour by themselves.
    return f'<table style="color:inherit">{"".join(lines)}</table>'


def _cell(share: float | None, text: str) -> str:
    style = "text-align:center"
    if share is not None:
        red, green, blue = (
            round(low + share * (high - low)) for low, high in zip(_LOW, _HIGH, strict=True)
        )
        ink = "#000" if share < _DARK else "#fff"
        style += f";background:rgb({red},{green},{blue});color:{ink}"
    return f'<td style="{style}">{escape(text)}</td>'
