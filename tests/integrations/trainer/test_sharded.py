"""FSDP2 and DeepSpeed's ZeRO under the Trainer: two processes train what one trains."""

import json
import shutil

import pytest
import two_ranks
from safetensors.torch import load_file

for library in ("transformers", "accelerate", "deepspeed"):
    pytest.importorskip(library, reason="the test extra is not installed")
if shutil.which("g++") is None:
    pytest.skip("DeepSpeed compiles what it needs on a CPU", allow_module_level=True)
import sharded_runs as runs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(processes, tmp_path_factory):
    """What each rank found, and where."""
    folder = tmp_path_factory.mktemp("divided")
    two_ranks.wait_for(two_ranks.start(processes, runs.everything, folder), 900)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's."""
    folder = tmp_path_factory.mktemp("one")
    return {m: runs.training(folder / m, "", m) for m in runs.METHODS}, folder


def distance(ours, one, key):
    pairs = [(a[key], b[key]) for a, b in zip(ours["log"], one["log"], strict=True)]
    if one["log"][0][key] is None:
        assert pairs == [(None, None)] * len(pairs)
        return 0.0
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize(("engine", "method"), runs.TRAINED)
def test_two_processes_are_one(found, alone, engine, method):
    (first, second), folder = found
    ones, folder_of_one = alone
    ours, one = first[f"{engine} {method}"], ones[method]
    # It moves, it is clipped, and some positions are closed.
    assert abs(one["log"][-1]["tau_mean"] - one["log"][0]["tau_mean"]) > 1e-3
    assert all(entry["grad_norm"] > runs.CLIP for entry in one["log"])
    led = one["log"][-1:] if one["thresholds"] else one["log"]  # a schedule begins with none
    assert all(0.01 < entry["sparsity"] < 0.99 for entry in led)
    for key in runs.KEPT:
        assert distance(ours, one, key) < 1e-5, key
    assert ours["masks"] == second[f"{engine} {method}"]["masks"] == one["masks"]
    if method == "adalora":
        assert one["masks"][-1] != one["masks"][0]
    if method != "dora":
        assert min(one["thresholds"]) > 1e-3
        assert ours["thresholds"] == pytest.approx(one["thresholds"], rel=1e-4)
    places = (folder / engine, folder_of_one)
    adapters = [load_file(place / method / "adapter" / runs.WEIGHTS) for place in places]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        assert (value - adapters[1][name]).abs().max() < 1e-5, name


def test_each_of_several_processes_goes_on_from_its_own(processes, tmp_path):
    """It was given batches of its own, of which a schedule's end is told."""
    two_ranks.wait_for(two_ranks.start(processes, runs.replicated, tmp_path))
    for rank in (0, 1):
        whole, resumed = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert resumed == whole


@pytest.mark.parametrize("engine", runs.RESUMED)
def test_a_resumed_run_is_one_that_was_not_stopped(found, engine):
    (first, second), folder = found
    whole, resumed = first[f"{engine} resumed"]
    assert whole["log"][-1] != whole["log"][2]
    assert resumed == whole
    assert second[f"{engine} resumed"][0]["masks"] == whole["masks"]
    before, after, stopped = (
        load_file(folder / engine / "resumed" / place)
        for place in (
            "whole/" + runs.WEIGHTS,
            "again/" + runs.WEIGHTS,
            f"checkpoint-{runs.STEPS // 2}/" + runs.WEIGHTS,
        )
    )
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert any((before[name] != stopped[name]).any() for name in before)
