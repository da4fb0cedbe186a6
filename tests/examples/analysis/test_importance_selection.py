"""The example of Table 4 and Figure 8: what it selects, trains, keeps and writes."""

import csv
import importlib
import json
import sys

import pytest
from models import away_from_initialisation
from places import EXAMPLES

for needed in ("matplotlib", "sklearn", "timm", "tqdm"):
    pytest.importorskip(needed, reason="the examples extra is not installed")


@pytest.fixture
def example(monkeypatch, tmp_path):
    """The example's module, in which a training is a draw; `calls` has the runs, in their order."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "analysis"))
    quickstart = importlib.import_module("quickstart")
    module = importlib.import_module("importance_selection")
    monkeypatch.setattr(module, "calls", [], raising=False)

    def train(model, groups, data, epochs, name, bar):
        module.calls.append(name)
        if name != "pretraining":
            away_from_initialisation(model, 0.1)
            for layer in module.tokengate.layers(model).values():
                if layer.gate is not None:
                    layer.gate.tau.data.uniform_(0, 2)

    def few(shifted):
        (images, labels), (others, answers) = quickstart.load_images(shifted)
        return (images[:40], labels[:40]), (others[:50], answers[:50])

    monkeypatch.setattr(quickstart, "train", train)
    monkeypatch.setattr(module, "load_images", few)

    def main(*options):
        module.calls.clear()
        monkeypatch.setattr(sys, "argv", ["example", "--output", str(tmp_path), *options])
        module.main()

    monkeypatch.setattr(module, "run", main, raising=False)
    return module


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_run_once_on_what_the_first_runs_say(example, tmp_path, capsys):
    options = ["--epochs", "1", "--sweep", "25", "75", "100", "--seeds", "0", "1", "--draws", "2"]
    example.run(*options)
    # Two first runs, six rows of Table 4, two draws and two more percentages.
    one_seed = ["pretraining", "gated dora", *["ungated dora"] * 11]
    assert example.calls == one_seed * 2
    results = read(tmp_path / "results.csv")
    assert len(results) == 24
    by_run = {(r["seed"], r["row"], r["percent"], r["draw"]): r for r in results}
    measured = json.loads((tmp_path / "seed-1" / "gated-all-modules-100-0.json").read_text())
    ungated = json.loads((tmp_path / "seed-1" / "all-modules-100-0.json").read_text())
    norms = ungated["norms"]

    def modules(row, percent="50", draw="0"):
        return set(by_run["1", row, percent, draw]["modules"].split())

    def first(numbers, sign):
        return set(sorted(numbers, key=lambda name: sign * numbers[name])[:8])

    low = modules("S_low")
    assert modules("S_low", "25") < low < modules("S_low", "75") < measured["sparsity"].keys()
    assert low == first(measured["sparsity"], 1)
    assert modules("S_high") == first(measured["sparsity"], -1) != low
    assert modules("norm_relative") == first(norms["relative"], -1)
    assert modules("norm_abs") == first(norms["absolute"], -1) != modules("norm_relative")
    assert modules("fisher") == first(ungated["fisher"], -1) != modules("norm_abs")
    assert len(modules("random")) == 8
    assert modules("random") != modules("random", draw="1")
    assert modules("half_rank") == set(measured["sparsity"])
    # Half the rank leaves DoRA its magnitudes.
    whole, half = (int(by_run["1", row, p, "0"]["parameters"]) for row, p in
                   (("all modules", "100"), ("half_rank", "50")))  # fmt: skip
    magnitudes = 4 * (192 + 64 + 128 + 64)
    assert half - magnitudes == (whole - magnitudes) / 2

    rows = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        *("S_low_50%", "S_high_50%", "norm_relative_50%", "norm_abs_50%", "fisher_50%"),
        *("random_50%", "half_rank_50%", "all modules", "gated, all modules"),
    ]
    draws = [float(by_run["0", "random", "50", d]["score"]) for d in "01"]
    assert rows[7].split("|")[2].strip() == f"{sum(draws) / 2:.1f}"
    assert rows[2] in capsys.readouterr().out
    assert (tmp_path / "selection.png").stat().st_size > 10_000


def test_what_is_there_is_not_run_again(example, tmp_path):
    example.run("--smoke")
    assert len(example.calls) == 10
    table = (tmp_path / "table.md").read_text()
    example.run("--smoke")
    assert example.calls == []
    assert (tmp_path / "table.md").read_text() == table
    # Interrupted: a file in part, and one run that is missing.
    (tmp_path / "seed-0" / "S_high-50-0.json").rename(tmp_path / "seed-0" / "S_high-50-0.part")
    example.run("--smoke")
    assert example.calls == ["ungated dora"]
    assert (tmp_path / "table.md").read_text() == table
    with pytest.raises(SystemExit, match=r"'rank': 8, .*'rank': 4, .* pass another --output"):
        example.run("--smoke", "--rank", "4")
    assert example.calls == []


def test_other_percentages(example, tmp_path):
    example.run("--smoke", "--percent", "25")
    by_row = {r["row"]: r for r in read(tmp_path / "results.csv")}
    counts = {row: int(r["count"]) for row, r in by_row.items()}
    assert (counts.pop("all modules"), counts.pop("gated, all modules")) == (16, 16)
    assert counts.pop("half_rank") == 16
    assert set(counts.values()) == {4, 8}  # 50 % of the sweep's
    for wrong in ("0", "101"):
        with pytest.raises(SystemExit):
            example.run("--percent", wrong)
