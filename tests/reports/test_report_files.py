"""A report's lines for other programs: CSV and pandas."""

import importlib
import math

import pytest

from tokengate import SparsityReport, TokenGateError
from tokengate.reports.report import ModuleSparsity

REPORT = SparsityReport(
    {
        "layers.0.q": ModuleSparsity(0.25, 2, 8, 6, 0.5),
        "layers.0.v": ModuleSparsity(math.nan, 0, 0, 0, None),
    }
)


def test_csv_is_written_as_it_is_returned(tmp_path):
    text = REPORT.to_csv(tmp_path / "report.csv")
    assert text == REPORT.to_csv()
    assert (tmp_path / "report.csv").read_text() == text
    assert text.splitlines() == [
        "module,sparsity,samples,positions,modified,tau",
        "layers.0.q,0.25,2,8,6,0.5",
        "layers.0.v,,0,0,0,",
    ]
    with pytest.raises(TokenGateError, match="folder"):
        REPORT.to_csv(tmp_path)


def test_a_frame_has_the_same(tmp_path):
    pandas = pytest.importorskip("pandas", reason="the test extra is not installed")
    frame = REPORT.to_frame()
    REPORT.to_csv(tmp_path / "report.csv")
    pandas.testing.assert_frame_equal(frame, pandas.read_csv(tmp_path / "report.csv"))
    assert frame.set_index("module")["sparsity"]["layers.0.q"] == 0.25
    assert frame["sparsity"].isna().tolist() == [False, True]
    nothing = SparsityReport({"a": ModuleSparsity(math.nan, 0, 0, 0, None)}).to_frame()
    assert nothing["tau"].dtype == float


def test_without_pandas(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(TokenGateError, match="to_frame was asked for without pandas"):
        REPORT.to_frame()
