"""The benchmarks run, on tiny models; and what they compare is what it is called."""

import argparse
import gc
import importlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from places import EXAMPLES

for library, extra in (("peft", "test"), ("transformers", "test"), ("matplotlib", "viz")):
    pytest.importorskip(library, reason=f"the {extra} extra is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

FOLDER = EXAMPLES / "benchmarks"
SHAPE = [
    *("hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "vocab_size=64"),
    *("num_attention_heads=4", "num_key_value_heads=2"),
]
TINY = [
    *("--config", *SHAPE, "--batch", "2", "--length", "16", "--rank", "4"),
    *("--rounds", "1", "--warmup", "0", "--threads", "1"),
]
ALL = {"frozen base", "tokengate, gated", "tokengate, ungated", "PEFT", "PEFT, same dtype"}
METHODS = ["lora", "dora", "adalora"]


@pytest.fixture
def script(monkeypatch):
    """Imports one of the folder's files, none of which is known before or after."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert not names & set(sys.modules)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def run(script, monkeypatch, tmp_path, capsys):
    """The results of one of the scripts, which also prints and draws them."""

    def run(name, *arguments):
        argv = [f"{name}.py", *TINY, *arguments, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", argv)
        script(name).main()
        text = (tmp_path / "results.json").read_text()
        assert str(tmp_path) not in text
        found = json.loads(text)
        assert (found["options"]["seed"], found["options"]["threads"]) == (0, 1)
        assert found["versions"]["torch"] == torch.__version__.split("+")[0]
        assert (tmp_path / "figure.png").stat().st_size > 10_000
        printed = capsys.readouterr().out
        for case, variants in found["results"].items():
            for variant, numbers in variants.items():
                assert any(case in line and variant in line for line in printed.splitlines())
                assert len(numbers) == 1
                assert all(0 < number < math.inf for number in numbers)
        assert all(0 < closed < 1 for closed in found["sparsity"].values())
        return found

    return run


@pytest.mark.parametrize(
    ("name", "methods", "cases"),
    [
        ("step", METHODS, [""]),
        ("decode", ["dora"], [", prompt", ", token"]),
        ("memory", ["adalora"], [", kept", ", peak"]),
    ],
)
def test_all_variants_of_all_settings(run, name, methods, cases):
    more = ["--new", "2"] if name == "decode" else []
    dtypes = ["float32", "bfloat16"]
    found = run(name, "--methods", *methods, "--dtypes", *dtypes, "--same-dtype", *more)
    settings = {f"{m}, {d}, dropout 0.05" for m in methods for d in dtypes}
    assert set(found["sparsity"]) == settings
    assert set(found["results"]) == {setting + case for setting in settings for case in cases}
    for case, variants in found["results"].items():
        # In float32, PEFT's adapters are of the base's dtype as they come.
        assert set(variants) == (ALL if "bfloat16" in case else ALL - {"PEFT, same dtype"})


# In a process of its own, because what compiling leaves behind counts in other tests.
COMPILED = """
import runpy, sys, torch
inductor = torch.nn.Module.compile
def quickly(model):
    print("compiled one")
    inductor(model, backend="eager")
torch.nn.Module.compile = quickly
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_compiled_are_all_variants(tmp_path):
    """PEFT's DoRA takes the most pieces."""
    asked = ["--methods", "dora", "--dtypes", "float32", "--compile", "--out", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED, str(FOLDER / "step.py"), *TINY, *asked],
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    [variants] = json.loads((tmp_path / "results.json").read_text())["results"].values()
    assert ran.stdout.count("compiled one") == len(variants) == 4


def test_four_axes(run):
    axes = {"batches": "12", "ranks": "12", "widths": ("16", "32"), "layers": "12"}
    found = run("scaling", *(word for axis in axes for word in (f"--{axis}", *axes[axis])))
    assert set(found["results"]) == {f"{axis} {size}" for axis in axes for size in axes[axis]}
    for variants in found["results"].values():
        assert set(variants) == {"frozen base", "tokengate, gated", "tokengate, ungated"}
    assert set(found["slopes"]) == set(axes)
    for slopes in found["slopes"].values():
        assert set(slopes) == {"tokengate, gated", "tokengate, ungated"}
        assert all(map(math.isfinite, slopes.values()))


def test_what_is_closed_held_out(script, monkeypatch, tmp_path, capsys):
    """Of each kind a training; one more beside those that were there; and of these some."""
    held_out, shown = script("held_out"), []
    for options in ("--trainings 1", "--trainings 2", "--trainings 1 --kinds alike"):
        asked = [*options.split(), "--asked", "20", "24", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["held_out.py", *asked])
        held_out.main()
        shown.append(re.findall(r"\| \d of (\d), ", capsys.readouterr().out))
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    found = [(each["kind"], each["seed"]) for each in map(json.loads, lines)]
    assert found == [(kind, seed) for seed in range(2) for kind in ("apart", "alike", "pictures")]
    assert all(abs(json.loads(line)["off"]) < 0.2 for line in lines)
    assert shown == [["1"] * 3, ["2"] * 3, ["1"]]
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_on_gpu_goes_on_where_it_was(script, monkeypatch, tmp_path, capsys):
    on_gpu = script("on_gpu")
    parts = ["llama3-8b-rank32-lora", "llava-1.5-7b-rank32-dora"]
    asked = [
        *("on_gpu.py", *TINY, "--device", "cpu", "--dtypes", "float32", "--tokens", "32"),
        *("--new", "2", "--out", str(tmp_path), "--parts", *parts),
    ]
    monkeypatch.setattr(sys, "argv", [*asked, "--work"])
    on_gpu.write(on_gpu.options_of(asked[1:]), parts[1], {"failed": "the device broke"})
    with pytest.raises(SystemExit) as ended:
        on_gpu.main()
    assert ended.value.code == 0
    found = json.loads((tmp_path / f"{parts[0]}.json").read_text())
    assert found["found"].keys() == {"step", "token", "peak"}
    for variants in found["found"].values():
        assert set(variants) == ALL - {"PEFT, same dtype"}
        assert all(0 < number < math.inf for numbers in variants.values() for number in numbers)
    monkeypatch.setattr(on_gpu.subprocess, "run", None)  # nothing is left to do
    monkeypatch.setattr(sys, "argv", asked)
    on_gpu.main()
    text = (tmp_path / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert f"| {parts[0]} | step: tokengate, gated / PEFT |" in text
    assert f"- {parts[1]} failed: the device broke" in text
    assert all((tmp_path / f"{name}.png").exists() for name in ("step", "token", "peak"))
    monkeypatch.setattr(sys, "argv", [*asked[:-2], "nonsense"])
    with pytest.raises(SystemExit, match="no part is called nonsense"):
        on_gpu.main()


def test_on_gpu_waits_for_no_part_that_hangs(script, monkeypatch, tmp_path):
    on_gpu = script("on_gpu")
    done, hung, left = "tests", "llama3-8b-rank32-lora", "llama3-8b-rank32-dora"
    asked = ["on_gpu.py", "--device", "cpu", "--out", str(tmp_path), "--parts", done, hung, left]
    monkeypatch.setattr(sys, "argv", asked)
    on_gpu.write(on_gpu.options_of(asked[1:]), done, {"failed": "the device broke"})

    def run(command, timeout):
        assert 0 < timeout < 60 * 10
        raise on_gpu.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    on_gpu.main()
    text = (tmp_path / "results.md").read_text()
    assert f"- {hung} failed: it had not ended" in text
    assert f"no time was left for: {left}" in text


FIRST = """<testsuites><testsuite>
    <testcase name="a[x]"/><testcase name="b"><skipped message="no GPU"/></testcase>
    <testcase name="c"><properties/><failure message="a device-side assert"/></testcase>
</testsuite></testsuites>"""
SECOND = """<testsuites><testsuite><testcase name="d"/></testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("ends", "how"),
    [
        ([(1, FIRST), (0, SECOND)], None),
        ([(1, FIRST), (5, None)], None),
        ([(1, FIRST), (-11, None)], "pytest ended with -11"),
        ([(1, FIRST), None], "the time was over"),
        ([(4, None)], "pytest ended with 4"),
    ],
)
def test_on_gpu_goes_on_after_a_test_that_fails(ends, how, script, monkeypatch, tmp_path):
    """In another process, without those that were run; and keeps what it knows whatever comes."""
    on_gpu, commands = script("on_gpu"), []
    (tmp_path / "tests.xml").write_text(SECOND)  # of an earlier run

    def run(command, timeout, **_):
        commands.append(command)
        if ends[len(commands) - 1] is None:
            raise on_gpu.subprocess.TimeoutExpired(command, timeout)
        code, report = ends[len(commands) - 1]
        if report is not None:
            (tmp_path / "tests.xml").write_text(report)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(on_gpu, "subprocess", argparse.Namespace(**vars(subprocess) | {"run": run}))
    found = on_gpu.tested(on_gpu.options_of(["--device", "cpu", "--out", str(tmp_path)]))
    assert len(commands) == len(ends)
    first = ends[0][1] is not None
    assert found["tests"] == (3 if first else 0) + (SECOND in ends[-1] if ends[-1] else 0)
    assert found["broken"] == ({"c": "a device-side assert"} if first else {})
    assert found["skipped"] == first
    assert found["ended"] == (how or "")
    text = on_gpu._of_tests(found)
    assert (how or "failed") in text
    if first:
        file = "tests/kernels/triton/test_on_gpu.py"
        assert {f"--deselect={file}::{name}" for name in ("a[x]", "b", "c")} <= set(commands[1])
        assert "- c: a device-side assert" in text


def test_the_gpu_is_named_by_a_part_that_did_not_use_it_itself(script, monkeypatch):
    """As the tests do not, which run in a process of their own and are the first part."""
    about = script("results").about
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert about(argparse.Namespace(device="cuda"))["gpu"] == "a GPU"
    assert about(argparse.Namespace(device="cpu"))["gpu"] is None


@pytest.fixture(params=METHODS)
def setting(request, script, monkeypatch):
    """A tiny one of each method."""
    monkeypatch.setattr(sys, "argv", ["", *TINY, "--methods", request.param, "--dtypes", "float32"])
    settings = script("settings")
    [found] = settings.settings(settings.parser("", "").parse_args())
    return found


def test_the_same_is_compared(script, setting):
    variants = script("variants")
    ids = variants.tokens(setting)
    with torch.no_grad():
        logits = {n: m.eval()(input_ids=ids).logits for n, m in variants.models(setting).items()}
    base, gated = logits["frozen base"], logits["tokengate, gated"]
    ungated, peft = logits["tokengate, ungated"], logits["PEFT"]
    change = (ungated - base).norm()
    # AdaLoRA's is the smallest: a product of three that are.
    assert change > 1e-4 * base.norm()
    assert (peft - base).norm() > 1e-4 * base.norm()
    assert (ungated - peft).norm() < 1e-2 * change
    # Half of the positions are left alone.
    assert (gated - ungated).norm() > 0.1 * change
    assert (gated - base).norm() > 0.1 * change


def test_what_was_kept_is_given_back(script, setting):
    variants, memory = script("variants"), script("memory")

    def tensors_after(training):
        assert memory.kept(training) > 0
        gc.collect()
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        # A layer takes the hooks for checkpointing, and remembers two channels of 32 inputs.
        return sum(tensor.shape[-1:] != (2,) for tensor in tensors)

    for training in variants.trainings(variants.models(setting), setting).values():
        assert tensors_after(training) == tensors_after(training)


def test_gates_that_are_led_beside_the_papers(run):
    found = run("gates", "--methods", "lora", "--dtypes", "float32")
    cases = [case.rsplit(", ", 2)[1:] for case in found["results"]]
    assert [case[-1] for case in cases] == ["ms", "MiB", "MiB"]
    assert all(list(case) == ["threshold", "firm", "fisher"] for case in found["results"].values())
    (counted,) = found["operations"].values()
    assert 0 < counted["fisher"] <= 1.1 * counted["threshold"]
    (closed,) = found["sparsity"].values()
    assert 0.3 < closed < 0.7


def test_what_gpus_are_to_confirm_runs_where_there_is_none(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["divided.py", "--steps", "2", "--out", str(tmp_path)])
    script("divided").main()
    found = json.loads((tmp_path / "ddp-float32.json").read_text())
    assert len(found) == 2
    assert found[1]["tau_mean"] != found[0]["tau_mean"]
    assert "tau_mean: " in capsys.readouterr().out
