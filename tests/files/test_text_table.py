"""Whatever is in a name, a terminal, Markdown and a spreadsheet show it and do nothing."""

import csv
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokengate
from tokengate.errors import (
    DifferentBaseWarning,
    MixedPositionsWarning,
    TokenGateError,
    UnreachedLayerWarning,
    brief,
    printable,
)
from tokengate.files.text_table import csv_table, lines, markdown_table, text_table
from tokengate.reports.module_sparsity import ModuleSparsity

HOSTILE = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\link", "a\nforged line", "a\r\x1b[2K",
    "\x9b31m", "‮gnp", "a\u2028b", "\x7f", "\0", "\ud800", "a\x85b", "zero​width",
]  # fmt: skip
NAMES = st.text(st.sampled_from("ab.\n\r\x1b[m|\\`<>*&=+-@#$~!]: \u202e\x85é"), max_size=12)


def only_shown(text, count):
    """Whether it is so many lines of what can be seen."""
    found = text.split("\n")
    return len(found) == count and all(line.isprintable() for line in found)


@pytest.mark.parametrize("kind", [
    TokenGateError, UnreachedLayerWarning, MixedPositionsWarning, DifferentBaseWarning,
])  # fmt: skip
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_errors_and_warnings_are_one_line_of_what_can_be_seen(kind, name):
    assert not name.isprintable()
    assert only_shown(str(kind(f"{name} is wrong")), 1)
    assert str(kind("plain, 'é' and 層")) == "plain, 'é' and 層"


def test_printable_is_what_python_writes():
    assert printable("a\x1b[1m\n\u202e\ud800é") == "a\\x1b[1m\\n\\u202e\\ud800é"


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_lines_and_tables_have_as_many_lines_as_rows(names):
    assert only_shown(lines(names), len(names))
    assert only_shown(text_table(["layer", "x"], [[name, 1.5] for name in names]), len(names) + 1)
    assert only_shown(markdown_table(["layer"], [[name] for name in names]), len(names) + 2)
    found = list(csv.reader(io.StringIO(csv_table(["layer", "x"], [[n, -2] for n in names]))))
    assert len(found) == len(names) + 1
    for row in found[1:]:
        assert row[1] == "-2"
        assert row[0].isprintable()
        assert not row[0].lstrip().startswith(("=", "+", "-", "@"))


@given(NAMES)
def test_a_cell_of_markdown_is_text(name):
    """Every mark in it has a backslash of its own, so that none of them ends the cell."""
    cell = markdown_table(["layer"], [[name]]).splitlines()[2].removeprefix("| ")[:-2]
    assert re.fullmatch(r"(?:\\[\\`*~\[\]<>|&$@#:!]|[^\\`*~\[\]<>|&$@#:!])*", cell)
    assert re.sub(r"\\(.)", r"\1", cell) == printable(name)


FORMULAS = ['=HYPERLINK("http://x")', "+1", "-1+2", "@x", " =1", "\uff1d1", "\uff0d1"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_name_is_no_formula(name):
    [row] = list(csv.reader(io.StringIO(csv_table(["m"], [[name]]))))[1:]
    assert row == [f"'{name}"]


def test_a_report_of_a_stranger(tmp_path):
    name = "layers.0.\x1b[31m|=1\nx"
    module = ModuleSparsity(0.5, 1, 2, 1, 0.1)
    tokengate.SparsityReport({name: module, "=2+3": module}).save(tmp_path / "report.json")
    report = tokengate.SparsityReport.load(tmp_path / "report.json")
    assert name in report.modules
    assert only_shown(str(report), 6)
    assert only_shown(report.to_markdown(), 5)
    assert report.to_csv().splitlines()[2].startswith("'=2+3,0.5")
    other = tokengate.SparsityReport({"b\x1b": module, name: module})
    assert only_shown(str(report.compare(other)), 5)
    assert "\x1b" not in report._repr_html_()


@pytest.mark.parametrize("value", [
    "x" * 10**6, ["x" * 10**6] * 1000, list(range(10**6)), {str(i): [i] for i in range(10**6)},
    [[[[0] * 1000] * 1000] * 1000] * 1000,
], ids=range(5))  # fmt: skip
def test_brief_looks_at_no_more_than_it_shows(value):
    text = brief(value)
    assert len(text) == 80
    assert text.endswith("...")


@given(st.recursive(
    st.integers() | st.text(max_size=100) | st.none() | st.floats(),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=5), inner),
))  # fmt: skip
def test_brief_is_the_beginning_of_what_python_writes(value):
    whole = " ".join(repr(value).split())
    if isinstance(value, str) and len(whole) > 80:
        assert brief(value).startswith(whole[:60])  # a quote behind it may choose the other quotes
    else:
        assert brief(value) == (whole if len(whole) <= 80 else f"{whole[:77]}...")
