"""What the recipes share: every combination is trained once, and the table says what they gave."""

import argparse
import gc
import importlib
import json
import shutil
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from places import RECIPES
from recipe_runs import ranked
from two_ranks import start, wait_for

for needed in ("matplotlib", "transformers", "sklearn"):
    pytest.importorskip(needed, reason="the examples extra is not installed")


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("recipe")


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("recipe_results")


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


def test_what_was_begun_with_other_settings_is_not_gone_on_with(recipe, monkeypatch, tmp_path):
    def interrupted(run):
        (run.folder / "checkpoint-1").mkdir(parents=True)
        (run.folder / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
        raise KeyboardInterrupt

    def perform(run):
        ran.append(run.lr)
        return {"scores": {"T": 50.0}, "sparsity": {"T": 25.0}}

    ran = []
    line = f"--gate off --output {tmp_path} --lr"
    with pytest.raises(KeyboardInterrupt):
        recipe.main(planned(recipe, monkeypatch, f"{line} 0.1"), interrupted)
    with pytest.raises(SystemExit, match=r"other settings \(lr\) than were asked"):
        recipe.main(planned(recipe, monkeypatch, f"{line} 0.2"), perform)
    assert ran == []
    recipe.main(planned(recipe, monkeypatch, f"{line} 0.1"), perform)
    assert ran == [0.1]
    assert [path.name for path in (tmp_path / "lora-off-0").iterdir()] == ["results.json"]


def test_what_failed_before_its_first_checkpoint_is_begun_anew(recipe, monkeypatch, tmp_path):
    def perform(run):
        if run.lr == 0.1:
            raise FileNotFoundError(2, "No such file", "/nowhere")
        return {"scores": {"T": 50.0}, "sparsity": {"T": 25.0}}

    line = f"--gate off --output {tmp_path} --lr"
    with pytest.raises(SystemExit, match=r"lora-off-0: .*No such file: '/nowhere'"):
        recipe.main(planned(recipe, monkeypatch, f"{line} 0.1"), perform)
    assert not (tmp_path / "lora-off-0" / "begun.json").exists()
    recipe.main(planned(recipe, monkeypatch, f"{line} 0.2"), perform)
    kept = json.loads((tmp_path / "lora-off-0" / "results.json").read_text())
    assert kept["settings"]["lr"] == 0.2


def test_what_an_interruption_left_beside_results_is_removed(recipe, monkeypatch, tmp_path):
    def perform(run):
        return {"scores": {"T": 50.0}, "sparsity": {"T": 25.0}}

    runs = planned(recipe, monkeypatch, f"--gate off --output {tmp_path}")
    recipe.main(runs, perform)
    (tmp_path / "lora-off-0" / "checkpoint-1").mkdir()
    begun = json.dumps({"settings": recipe.plain(runs[0])})
    (tmp_path / "lora-off-0" / "begun.json").write_text(begun)
    recipe.main(runs, None)
    assert [path.name for path in (tmp_path / "lora-off-0").iterdir()] == ["results.json"]


def test_other_settings_of_a_later_run_are_told_before_the_first(recipe, monkeypatch, tmp_path):
    ran = []

    def perform(run):
        ran.append(run.seed)
        return {"scores": {"T": 50.0}, "sparsity": {"T": 25.0}}

    line = f"--gate off --output {tmp_path}"
    recipe.main(planned(recipe, monkeypatch, f"{line} --seed 1"), perform)
    with pytest.raises(SystemExit, match=r"lora-off-1.results.json is of other settings \(lr\)"):
        recipe.main(planned(recipe, monkeypatch, f"{line} --seed 0 1 --lr 9"), perform)
    assert ran == [1]


def test_what_is_asked_for_twice_is_one_run(recipe, monkeypatch):
    runs = planned(recipe, monkeypatch, "--seed 1 0 1 --gate on on")
    assert [run.folder.name for run in runs] == ["lora-on-1", "lora-on-0"]


def test_gpus_that_one_process_would_share_out_are_refused(recipe, monkeypatch):
    # The Trainer would give each of them a whole batch.
    monkeypatch.setattr(recipe.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    run = argparse.Namespace(batch_size=4, accumulate=1)
    with pytest.raises(SystemExit, match=r"2 GPUs.* torchrun --nproc_per_node 2"):
        recipe.fit(None, run, [], None)


def test_a_run_begins_without_the_model_of_the_last(recipe, monkeypatch, tmp_path):
    class Model:
        """In a circle, as a Trainer and its model are."""

        def __init__(self):
            self.own = self

    left = []

    def perform(run):
        left.append([each() is not None for each in models])
        models.append(weakref.ref(Model()))
        return {"scores": {"T": 50.0}, "sparsity": {"T": 25.0}}

    models = []
    gc.disable()
    try:
        recipe.main(planned(recipe, monkeypatch, f"--output {tmp_path}"), perform)
    finally:
        gc.enable()
    assert left == [[], [False]]


def test_a_batch_that_cannot_be_divided(recipe):
    run = argparse.Namespace(batch_size=3, accumulate=2)
    with pytest.raises(SystemExit, match="3 is no multiple of 1 processes x 2 micro-batches"):
        recipe.fit(None, run, [], None)


@pytest.fixture
def glue(recipe, monkeypatch):
    """Run the GLUE recipe in small; what it kept of its runs, by their folders' names."""
    module = importlib.import_module("finetune_glue")

    def run(output, *more):
        line = ["finetune_glue.py", "--smoke", "--output", str(output), *more]
        monkeypatch.setattr(sys, "argv", line)
        module.main()
        return {p.parent.name: json.loads(p.read_text()) for p in output.glob("*/results.json")}

    return run


def losses(kept):
    return [entry["loss"] for entry in kept["log"] if "loss" in entry]


def stop_at(recipe, monkeypatch, step):
    """Be interrupted after so many steps, once."""
    stopped = []

    class Stops(recipe.TokenGateCallback):
        def on_step_end(self, args, state, control, **context):
            super().on_step_end(args, state, control, **context)
            if state.global_step == step and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "TokenGateCallback", Stops)


def test_a_training_goes_on_where_it_was_interrupted(recipe, glue, monkeypatch, tmp_path):
    # Four steps an epoch: 7 is within the second.
    line = ["--gate", "on", "--checkpoint-every", "2", "--batch-size", "8", "--dropout", "0.2"]
    whole = glue(tmp_path / "whole", *line)["cola-lora-on-0"]
    stop_at(recipe, monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        glue(tmp_path / "halves", *line)
    folder = tmp_path / "halves" / "cola-lora-on-0"
    (checkpoint,) = folder.glob("checkpoint-*")
    # A process that is killed while it saves leaves some behind that cannot be read.
    shutil.copytree(checkpoint, folder / "checkpoint-7")
    (folder / "checkpoint-7" / "trainer_state.json").unlink()
    shutil.copytree(checkpoint, folder / "checkpoint-9")
    state = folder / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    found = glue(tmp_path / "halves", *line)["cola-lora-on-0"]
    assert losses(found) == losses(whole)
    assert len(set(losses(found))) == 8
    assert found["report"] == whole["report"]
    assert {path.name for path in folder.iterdir()} == {"adapter", "results.json"}


def test_a_run_is_the_same_whichever_ran_before_it(glue, tmp_path):
    line = ["--gate", "on", "--dropout", "0.2", "--epochs", "1", "--seed"]
    several = glue(tmp_path / "several", *line, "0", "1")
    alone = glue(tmp_path / "alone", *line, "1")["cola-lora-on-1"]
    assert losses(several["cola-lora-on-0"]) != losses(alone) == losses(several["cola-lora-on-1"])
    assert several["cola-lora-on-1"]["report"] == alone["report"]


def test_every_method_is_trained(glue, tmp_path):
    line = "--task stsb --epochs 2 --method lora dora adalora adapter --gate 0.5"
    glue(tmp_path, *line.split())
    runs = glue(tmp_path, "--task", "stsb", "--epochs", "2", "--gate", "off", "0.5")
    assert len(runs) == 5
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| | STS-B |\n")
    assert table.count("\n") == 2 + 4 + 2 * 2  # with the drift of both
    for name, found in runs.items():
        assert (found["report"]["sparsity"] > 0) == ("-0.5-" in name), name


# The second trains its backbone, too.
@pytest.mark.parametrize(
    ("script", "batch", "folder", "held_out"),
    [
        ("finetune_glue", 32, "cola-lora-0.5-0", 15),
        ("vision_finetune", 16, "digits-lora-0.5-0", 32),
    ],
)
def test_two_processes_train_what_one_does(
    recipe, monkeypatch, processes, tmp_path, script, batch, folder, held_out
):
    # Of sentences all 32 in one step, so that how they are divided makes no difference.
    asked = ["--smoke", "--gate", "0.5", "--batch-size", str(batch), "--output"]
    two = start(processes, ranked, f"{script}.py", [*asked, tmp_path / "2"])
    line = [f"{script}.py", *asked, str(tmp_path / "1"), "--accumulate", "2"]
    monkeypatch.setattr(sys, "argv", line)
    importlib.import_module(script).main()
    wait_for(two)
    logs, reports, scores = [], [], []
    for count in (2, 1):
        found = json.loads((tmp_path / str(count) / folder / "results.json").read_text())
        assert found["on"]["processes"] == count
        logs.append([(e["loss"], e["tau_mean"]) for e in found["log"] if "loss" in e])
        reports.append(found["report"])
        scores += found["scores"].values()
    assert logs[0][-1][1] != 0
    assert np.allclose(*logs, atol=1e-5)
    # Of those that are held out each counts once, also of 15, which two cannot share evenly.
    samples = {m["samples"] for each in reports for m in each["modules"].values()}
    assert samples == {held_out}
    two, one = ([m["positions"] for m in each["modules"].values()] for each in reports)
    assert two == one
    assert 0 < reports[1]["sparsity"] < 1
    assert scores[0] == pytest.approx(scores[1])
    assert reports[0]["sparsity"] == pytest.approx(reports[1]["sparsity"], abs=0.01)


class Sums(torch.nn.Module):
    """Logits of a row are its number and its double."""

    def forward(self, x):
        return {"logits": torch.stack([x, 2 * x], dim=-1)}


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2)])
def test_a_prediction_is_of_each_row_in_their_order(recipe, monkeypatch, rank, processes):
    args = types.SimpleNamespace(
        process_index=rank, world_size=processes, per_device_eval_batch_size=2,
        dataloader_num_workers=0, device="cpu",
    )  # fmt: skip
    elsewhere = [(0, np.array([3.0, 6.0])), (2, np.array([2.0, 4.0]))] if rank else []
    monkeypatch.setattr(recipe, "gather_object", lambda mine: mine + elsewhere)
    model = Sums().train()
    trainer = types.SimpleNamespace(model=model, args=args)

    def collate(rows):
        assert not model.training
        return {"x": torch.tensor(rows, dtype=torch.float64)}

    found = recipe.predict(trainer, [3, 1, 2], collate)
    assert found.tolist() == [[3, 6], [1, 2], [2, 4]]


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


def test_the_table_has_how_far_every_run_is_from_its_base(results, tmp_path):
    drifts = [{**one, "drift": {"A": 0.25}, "drift of 0.8 M(x)": {"A": 0.125}} for one in FOUND]
    lines = results.write(FOUND, tmp_path).splitlines()
    more = results.write(drifts, tmp_path).splitlines()
    added = [line for line in more if line not in lines]
    both = ["| drift | 0.250 (0.000) |  |  |", "| drift of 0.8 M(x) | 0.125 (0.000) |  |  |"]
    assert added[:4] == both * 2  # of the ungated and of the gated one
    assert more.index(added[0]) == 1 + lines.index(
        "| LoRA | 81.0 (1.4) | 52.0 (2.8) | 66.5 (2.1) |"
    )
    assert [line for line in more if line not in added] == lines


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
