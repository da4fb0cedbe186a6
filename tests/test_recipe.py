"""What the recipes share: every combination is trained once, and the table says what they gave."""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

for needed in ("matplotlib", "transformers", "sklearn"):
    pytest.importorskip(needed, reason="the examples extra is not installed")
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("recipe")


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("results")


def planned(recipe, monkeypatch, line, preset=lambda run: {}):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *line.split()])
    return recipe.planned(recipe.options("A recipe."), preset)


def test_each_combination_is_a_run_of_its_own(recipe, monkeypatch):
    line = "--method lora dora --gate off 0.6 --seed 0 1 --output o"
    runs = planned(recipe, monkeypatch, line)
    assert [str(run.folder) for run in runs] == [
        "o/lora-off-0", "o/lora-off-1", "o/lora-0.6-0", "o/lora-0.6-1",
        "o/dora-off-0", "o/dora-off-1", "o/dora-0.6-0", "o/dora-0.6-1",
    ]  # fmt: skip
    assert [(run.method, run.gate, run.seed) for run in runs[:3]] == [
        ("lora", "off", 0), ("lora", "off", 1), ("lora", "0.6", 0),
    ]  # fmt: skip


def test_what_was_given_comes_before_a_preset_and_that_before_a_default(recipe, monkeypatch):
    def preset(run):
        return {"lr": 5.0, "epochs": 7.0} if run.method == "dora" else {}

    line = "--method lora dora --gate on --epochs 3"
    lora, dora = planned(recipe, monkeypatch, line, preset)
    assert lora.lr == 1e-3 != dora.lr == 5.0
    # Given, though it is also the default.
    assert lora.epochs == dora.epochs == 3


def test_a_preset_comes_before_what_a_recipe_has_as_its_default(recipe, monkeypatch):
    options = recipe.options("A recipe.")
    options.set_defaults(lr=2.0, rank=5)
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    run = recipe.planned(options, lambda run: {"lr": 5.0})[0]
    assert (run.lr, run.rank) == (5.0, 5)


@pytest.mark.parametrize("wrong", ["1", "0", "half", "nan", "-0.1"])
def test_a_gate_that_is_none(recipe, monkeypatch, capsys, wrong):
    with pytest.raises(SystemExit):
        planned(recipe, monkeypatch, f"--gate={wrong}")
    assert f"{wrong} is not off, on or a sparsity within 0 and 1" in capsys.readouterr().err


def test_a_run_with_results_is_not_repeated(recipe, monkeypatch, tmp_path, capsys):
    ran = []

    def perform(run):
        ran.append(run.folder.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return {"scores": {"T": 50.0}, "sparsity": {"T": 25.0}}

    line = f"--gate off on --output {tmp_path} --lr 0.1"
    runs = planned(recipe, monkeypatch, line)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(runs, perform)
    recipe.main(runs, perform)
    assert ran == ["lora-off-0", "lora-on-0", "lora-on-0"]
    assert "| LoRA_S | 50.0 |" in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 5_000
    kept = json.loads((tmp_path / "lora-on-0" / "results.json").read_text())
    assert (kept["settings"]["lr"], kept["settings"]["gate"]) == (0.1, "on")
    # Where it lies and how it is split up makes no other run of it.
    recipe.main(planned(recipe, monkeypatch, f"{line} --accumulate 4"), perform)
    other = planned(recipe, monkeypatch, f"{line} --lr 0.2")
    with pytest.raises(SystemExit, match=r"other settings \(lr\) than were asked"):
        recipe.main(other, perform)
    assert len(ran) == 3


def test_a_batch_that_cannot_be_divided(recipe):
    run = argparse.Namespace(batch_size=3, accumulate=2)
    with pytest.raises(SystemExit, match="3 is no multiple of 1 processes x 2 micro-batches"):
        recipe.fit(None, run, [], None)


def test_a_training_goes_on_where_it_was_interrupted(recipe, monkeypatch, tmp_path):
    glue = importlib.import_module("finetune_glue")
    callback = recipe.TokenGateCallback
    stopped = []

    class Stops(callback):
        def on_step_end(self, args, state, control, **context):
            super().on_step_end(args, state, control, **context)
            if state.global_step == 3 and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt

    def run(output):
        line = f"finetune_glue.py --smoke --gate on --checkpoint-every 2 --output {output}"
        monkeypatch.setattr(sys, "argv", line.split())
        glue.main()

    run(tmp_path / "whole")
    monkeypatch.setattr(recipe, "TokenGateCallback", Stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves")
    folder = tmp_path / "halves" / "cola-lora-on-0"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    run(tmp_path / "halves")
    found = json.loads((folder / "results.json").read_text())
    whole = json.loads((tmp_path / "whole" / "cola-lora-on-0" / "results.json").read_text())
    losses = [
        [entry["loss"] for entry in each["log"] if "loss" in entry] for each in (whole, found)
    ]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4
    assert found["report"] == whole["report"]
    assert {path.name for path in folder.iterdir()} == {"adapter", "results.json"}


def test_every_method_is_trained(recipe, monkeypatch, tmp_path):
    glue = importlib.import_module("finetune_glue")
    line = "finetune_glue.py --smoke --task stsb --method lora dora adalora adapter --gate"
    monkeypatch.setattr(sys, "argv", [*line.split(), "off", "0.5", "--output", str(tmp_path)])
    glue.main()
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| | STS-B |\n")
    assert table.count("\n") == 2 + 4 * 4
    for folder in tmp_path.glob("*-*"):
        found = json.loads((folder / "results.json").read_text())
        assert (found["report"]["sparsity"] > 0) == ("-0.5-" in folder.name), folder.name


def test_two_processes_train_what_one_does(recipe, tmp_path):
    # 32 rows, all in one step, so that how they are divided makes no difference.
    script = [EXAMPLES / "finetune_glue.py", "--smoke", "--gate", "0.5", "--batch-size", "32"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = []
    for processes in ("2", "1"):
        folder = tmp_path / processes
        command = [*run, processes, *script, "--output", folder, "--accumulate", 3 - int(processes)]
        subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
        found = json.loads((folder / "cola-lora-0.5-0" / "results.json").read_text())
        assert found["on"]["processes"] == int(processes)
        logs.append([(e["loss"], e["tau_mean"]) for e in found["log"] if "loss" in e])
    assert logs[0][-1][1] != 0
    assert np.allclose(*logs, atol=1e-5)


FOUND = [
    {"settings": {"method": method, "gate": gate, "seed": seed}, "scores": scores,
     "sparsity": sparsity}
    for method, gate, seed, scores, sparsity in [
        ("lora", "off", 0, {"A": 80.0, "B": 50.0}, {"A": 0.0, "B": 0.0}),
        ("lora", "off", 1, {"A": 82.0, "B": 54.0}, {"A": 0.0, "B": 0.0}),
        ("lora", "0.6", 0, {"A": 81.0}, {"A": 60.0}),
        ("lora", "0.6", 1, {"A": 79.0}, {"A": 64.0}),
        ("lora", "0.6", 0, {"B": 50.0}, {"B": 61.0}),
        ("dora", "on", 0, {"A": 70.0}, {"A": 10.0}),
    ]
]  # fmt: skip


def test_the_table(results, tmp_path):
    # Worked out by hand: deviations of a sample; differences within a seed; an average only of the
    # seeds that have all tests, and none for who lacks a test.
    assert results.write(FOUND, tmp_path) == (
        "| | A | B | avg |\n"
        "|:--|--:|--:|--:|\n"
        "| LoRA | 81.0 (1.4) | 52.0 (2.8) | 66.5 (2.1) |\n"
        "| LoRA_S 0.6 | 80.0 (1.4) | 50.0 | 65.5 |\n"
        "| sparsity (%) | 62.0 (2.8) | 61.0 | 60.5 |\n"
        "| LoRA_S 0.6 - LoRA | -1.0 (2.8) | +0.0 | +0.5 |\n"
        "| DoRA_S | 70.0 |  |  |\n"
        "| sparsity (%) | 10.0 |  |  |\n"
    )
    assert (tmp_path / "table.md").exists()
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_the_table_has_the_sparsity_of_parts_too(results, tmp_path):
    parts = [{**one, "sparsity of image": {"A": 12.0}} for one in FOUND]
    lines = results.write(FOUND, tmp_path).splitlines()
    more = results.write(parts, tmp_path).splitlines()
    added = [line for line in more if line not in lines]
    assert added == [
        "| sparsity of image (%) | 12.0 (0.0) |  |  |",
        "| sparsity of image (%) | 12.0 |  |  |",
    ]
    assert [line for line in more if line not in added] == lines
    assert more.index(added[0]) == lines.index("| sparsity (%) | 62.0 (2.8) | 61.0 | 60.5 |") + 1
