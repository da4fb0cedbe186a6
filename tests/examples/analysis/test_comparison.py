"""The comparison of gates: what is tuned, searched, done once and written."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from models import Net
from places import EXAMPLES
from torch.nn import functional as F

for needed in ("matplotlib", "sklearn", "timm", "tqdm", "transformers"):
    pytest.importorskip(needed, reason="the examples extra is not installed")

FISHER = {"a": 3.0, "b": 2.0, "c": 4.0, "d": 0.5, "e": 0.5}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "recipes"))
    monkeypatch.syspath_prepend(str(EXAMPLES / "analysis"))
    module = importlib.import_module("comparison")
    monkeypatch.setattr(module, "done", [], raising=False)

    def perform(task, settings, plain):
        """Best at a rate of its own; closes more, and costs more, the higher its knob is."""
        module.done.append(settings)
        best = {"ungated": 0.12}.get(settings.variant, 0.03)
        closed = settings.sparsity
        if settings.knob is not None:
            closed = 1 / (1 + 10 ** (-settings.knob - 5 - settings.lr))
        cost = 0.1 * closed * (2 if settings.variant == "threshold" else 1)
        score = 2 + abs(settings.lr - best) + cost + 0.01 * settings.seed
        found = {"score": {"validation": score, "test": score + 0.5}, "drift": 1 - closed / 2}
        scaled = [{"scale": 0.8, "validation": score, "test": score + 0.6, "drift": 0.5}]
        sparsity = {"validation": closed, "test": closed}
        return {
            **found,
            "sparsity": sparsity,
            "scaled": scaled,
            "fisher": FISHER,
            "named": ["a", "b"],
        }

    monkeypatch.setattr(module, "perform", perform)
    return module


def everything(lab, cell):
    return len(list(lab.cell(cell)))


def cell_of(example, variant, **more):
    sparsity = 0.0 if variant == "ungated" else 0.6
    return example.Cell(example.Settings("stories", variant, sparsity=sparsity), **more)


def test_a_rate_at_an_end_is_tried_beyond_and_each_run_is_done_once(example, tmp_path):
    lab = example.Lab(tmp_path, tmp_path)
    cell = cell_of(example, "ungated", seeds=2)
    everything(lab, cell)
    rates = [(s.lr, s.seed) for s in example.done]
    assert rates == [(0.015, 0), (0.03, 0), (0.06, 0), (0.12, 0), (0.24, 0), (0.12, 1)]
    # Interrupted within a line.
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:40])
    example.done.clear()
    everything(example.Lab(tmp_path, tmp_path), cell)
    assert [(s.lr, s.seed) for s in example.done] == [(0.12, 1)]
    example.done.clear()
    everything(example.Lab(tmp_path, tmp_path), replace(cell, tuned=False, seeds=1))
    assert example.done == []


def test_a_knob_is_searched_at_every_rate_until_the_validation_part_has_the_sparsity(
    example, tmp_path
):
    lab = example.Lab(tmp_path, tmp_path)
    everything(lab, cell_of(example, "threshold", seeds=3))
    chosen = [s for s in example.done if s.seed]
    assert len({(s.lr, s.knob) for s in chosen}) == 1
    assert chosen[0].lr == 0.03
    found = lab.run(chosen[0])["sparsity"]["validation"]
    assert abs(found - 0.6) <= example.NEAR
    first = [s.knob for s in example.done if s.lr == 0.015]
    assert len(first) > 2  # far from where it began
    assert len(example.done) < len(first) + 3 * 2 + 2  # the other rates begin where that ended


def test_a_search_is_gone_on_with_and_one_that_has_ended_is_not(example, tmp_path, monkeypatch):
    cell = cell_of(example, "threshold", seeds=1, tuned=False)
    steps = example.Lab(tmp_path, tmp_path).cell(cell)
    next(steps), next(steps)
    interrupted = list(example.done)
    everything(example.Lab(tmp_path, tmp_path), cell)
    together = list(example.done)
    example.done.clear()
    everything(example.Lab(tmp_path / "whole", tmp_path / "whole"), cell)
    assert len(interrupted) == 2 < len(together)
    assert example.done == together
    example.done.clear()
    everything(example.Lab(tmp_path, tmp_path), cell)
    assert example.done == []
    monkeypatch.setattr(example, "NEAR", 0.0)  # it ends after so many, near or not
    everything(example.Lab(tmp_path, tmp_path), cell)
    assert len(together) + len(example.done) == example.SEARCHES


@pytest.mark.parametrize(
    ("tried", "wanted"),
    [
        ({-4.0: 0.8}, -4.5),
        ({-4.0: 0.8, -4.5: 0.7}, -5.5),
        ({-4.0: 0.2}, -3.5),
        ({-4.0: 0.2, -3.0: 0.8}, -3.3333),
        ({-4.0: 0.59, -3.0: 0.99}, -3.8),  # no nearer to an end than a fifth
    ],
)
def test_the_next_knob(example, tried, wanted):
    assert example._next(tried, 0.6, 0.5) == pytest.approx(wanted)


def test_tables_and_pictures(example, tmp_path, monkeypatch, capsys):
    lab = example.Lab(tmp_path, tmp_path)
    for variant in ("ungated", "threshold", "fisher", "suggest"):
        everything(lab, cell_of(example, variant, seeds=3))
    page = tmp_path / "page.md"
    marks = example.comparison_results.BEGIN, example.comparison_results.END
    page.write_text(f"before\n{marks[0]}\nstale\n{marks[1]}\nafter\n")
    options = ["--tables", "--output", str(tmp_path), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["comparison.py", *options])
    example.main()
    text = (tmp_path / "tables.md").read_text()
    tuned = text.split("a rate tuned for each")[1]
    rows = [line for line in tuned.splitlines() if "|" in line]
    assert "have 0.50 (0.00) of the ungated runs'" in tuned
    assert "those with the highest 0.70 (0.00), and layers drawn by lot 0.4." in tuned
    # 2.5 + 0.01 seed at its own rate; differences are within a seed.
    assert rows[2:] == [
        "| ungated | 2.510 (0.010) |  | 0.0 (0.0) | 1.000 (0.000) | 0.12 | 3 |",
        "| ungated, 0.8 M(x) at test | 2.610 (0.010) | +0.100 (0.000) | 0.0 | 0.500 (0.000) "
        "| 0.12 | 3 |",
        rows[4],
        rows[5],
        "| fisher | 2.570 (0.010) | +0.060 (0.000) | 60.0 (0.0) | 0.700 (0.000) | 0.03 | 3 |",
    ]
    assert rows[4].startswith("| layers left out (suggest) | 2.570")
    assert rows[5].startswith("| threshold, lambda tuned | 2.6")
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "stale" not in page.read_text()
    assert rows[2] in page.read_text()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "one rate for all" in capsys.readouterr().out  # the middle one, of ungated too


def test_what_is_absent_is_left_out_with_a_reason(example, tmp_path, monkeypatch, capsys):
    options = ["--data", str(tmp_path), "--output", str(tmp_path), "--only", "stories/ungated"]
    monkeypatch.setattr(sys, "argv", ["comparison.py", *options])
    example.main()
    assert "stories is left out: there is no" in capsys.readouterr().out
    assert example.done == []


def test_every_variant_of_the_issue_is_planned_once(example):
    cells = example.planned()
    assert len(cells) == len(set(cells))
    named = {(c.settings.task, c.settings.variant) for c in cells}
    assert named == {(t, v) for t in example.TASKS for v in example.VARIANTS}


class Tiny:
    """A task of no meaning, in a second."""

    steps, head = 12, ()

    def model(self, seed):
        torch.manual_seed(seed)
        return Net()

    def targets(self, model):
        return [f"blocks.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj", "fc1")]

    def batches(self, seed, rows):
        draw = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            yield torch.randn(4, 6, 8, generator=draw)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch).flatten(0, 1), (batch[..., :3].argmax(-1)).flatten())

    @torch.no_grad()
    def score(self, model, part):
        return self.loss(model, next(self.batches(7, None))).item()

    @property
    def own(self):
        return [torch.ones(2, 3, 8)]


@pytest.mark.parametrize("variant", ["ungated", "rank", "suggest", "select", "fisher", "threshold"])
@pytest.mark.filterwarnings("ignore:SparsitySchedule was to close")
def test_a_run(example, variant):
    runs = importlib.import_module("comparison_runs")
    knob = -4.0 if variant == "threshold" else None
    settings = runs.Settings("tiny", variant, rank=5, sparsity=0.5, lr=0.05, knob=knob)
    plain = {"fisher": {name: float(i) for i, name in enumerate(Tiny().targets(None))}}
    found = json.loads(json.dumps(runs.perform(Tiny(), settings, plain)))
    assert found["layers"] == (3 if variant in ("suggest", "select") else 6)
    assert found["drift"] > 0
    if variant in ("suggest", "select"):
        assert found["sparsity"]["test"] == 0.5  # of the layers
    if variant == "ungated":
        assert found["scaled"][0]["drift"] < found["drift"]
        assert list(found["fisher"]) == Tiny().targets(None)
