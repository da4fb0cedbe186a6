"""docs/reports_page.md: its programs run as they stand, one after the other."""

import re

import pytest
from places import ROOT
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("pandas", reason="needs pandas")
pytest.importorskip("matplotlib", reason="needs matplotlib")


def test_its_programs_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", (ROOT / "docs/reports_page.md").read_text(), re.S)
    assert len(blocks) == 4
    scope = {}
    for block in blocks:
        exec(block, scope)
    written = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert written == {"report.html", "two.html", "report.csv", "report.png", "changes"}
    assert 0.01 < scope["report"].sparsity < 0.99
    assert "trainable params: " in capsys.readouterr().out
    (file,) = scope["files"]
    assert load_file(file)["model.layers.1.mlp.down_proj"].shape == (2, 24, 32)
