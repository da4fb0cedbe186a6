"""Tables and lines of text, and sizes in them, whatever is in the names that they hold.

What comes out of files goes to terminals, Markdown and spreadsheets from here alone: there, nothing
of it is obeyed.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokengate.errors import printable

# What Markdown reads as more than text: tables, code, emphasis, links, pictures, HTML, mentions.
_MARKED = re.compile(r"([\\`*~\[\]<>|&$@#:!])")
# What a spreadsheet computes, or passes to a program; also as East Asian keyboards type it.
_COMPUTED = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def lines(found: Iterable[str]) -> str:
    """Each of them on a line of its own, which it does not leave."""
    return "\n".join(map(printable, found))


def text_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their cells; the first to the left, the others to the right."""
    grid = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*grid, strict=True)]
    aligned = []
    for first, *rest in grid:
        cells = [c.rjust(width) for c, width in zip(rest, widths[1:], strict=True)]
        aligned.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(aligned)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same for Markdown, of cells that are text."""
    first, *others = [[_MARKED.sub(r"\\\1", printable(c)) for c in line] for line in (head, *rows)]
    grid = [first, [":--", *["--:"] * (len(head) - 1)], *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in grid)


def csv_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same as comma-separated values; numbers are as they are, None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (head, *rows):
        writer.writerow([_field(each) if isinstance(each, str) else each for each in row])
    return text.getvalue()


def _field(text: str) -> str:
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(_COMPUTED) else text


def size(count: float) -> str:
    """A number of bytes in the largest unit of which there is one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))
