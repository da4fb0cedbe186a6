"""How the command is called: its arguments, its help, what it needs, and whom it prints to."""

import os
import subprocess
import sys

import pytest
import torch
from commands import refused, saved
from places import ROOT

import tokengate
from tokengate.command_line import main


def test_a_reader_that_has_enough_may_leave(tmp_path):
    """As `| head -1`: no traceback, of however much is left."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(300)))
    tokengate.save(tokengate.patch(model, "all-linear", rank=1), tmp_path)
    command = [sys.executable, "-m", "tokengate.command_line", "inspect", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout.read(1) == b"{"
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 0


@pytest.mark.parametrize("arguments", [[], ["plan", "x"], ["inspect"], ["fold", "x"]])
def test_a_wrong_call_shows_how_to_call(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: tokengate" in capsys.readouterr().err


def test_it_is_installed_as_a_command():
    text = (ROOT / "pyproject.toml").read_text()
    assert '\ntokengate = "tokengate.command_line:main"\n' in text


def test_a_missing_library_is_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    text = refused(capsys, "plan", tmp_path, "--targets", "q_proj")
    assert "pip install 'tokengate[transformers]'" in text
    text = refused(capsys, "plan", "timm:vit_tiny_patch16_224", "--targets", "qkv")
    assert "pip install 'tokengate[timm]'" in text


def test_a_terminal_without_a_character_shows_how_python_writes_it(tmp_path):
    model = torch.nn.ModuleDict({"\u5c64": torch.nn.Linear(4, 4)})
    tokengate.save(tokengate.patch(model, ["\u5c64"], rank=2), tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tokengate.command_line", "inspect", str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert rb"\u5c64" in done.stdout


def in_a_new_process(*arguments):
    """Its exit code, what it said, and whether torch was imported."""
    code = (
        "import sys\nfrom tokengate.command_line import main\ncode = 1\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "print('torch' in sys.modules, file=sys.stderr)\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    said, _, imported = done.stderr.rstrip("\n").rpartition("\n")
    return done.returncode, done.stdout + said, imported == "True"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, f"tokengate {tokengate.__version__}"),
        (["plan", "--help"], 0, "example:"),
        ([], 2, "usage: tokengate"),
        (["fold", "x"], 2, "invalid choice: 'fold'"),
        (["plan", "x", "--targets", "a", "--rank", "eight"], 2, "invalid int value: 'eight'"),
        (["plan", "x", "--targets", "a", "--rank", "0"], 2, "rank=0 is not a whole number"),
        (["plan", "x", "--targets", "a", "--dropout", "1"], 2, "is not in [0, 1)"),
        (["plan", "x", "--targets", "a", "--alpha", "nan"], 2, "alpha=nan is not a finite"),
        (["plan", "x", "--targets", "a", "--method", "lorra"], 2, "did you mean 'lora'"),
        (["plan", "x", "--targets", "a", "--dtype", "int8"], 2, "invalid choice: 'int8'"),
        (["import", "x", "y", "--base", "z", "--penalty", "-1"], 2, "penalty=-1.0 is negative"),
        (["inspect", "nowhere"], 2, "'nowhere' does not exist: pass a folder"),
        (["report", "nowhere.json"], 2, "'nowhere.json' does not exist: pass a file"),
    ],
)
def test_arguments_are_checked_before_torch_is_imported(arguments, code, said):
    found, text, imported = in_a_new_process(*arguments)
    assert found == code
    assert said in text
    assert not imported


def test_the_test_of_imports_can_fail(tmp_path):
    saved(tmp_path)
    assert in_a_new_process("inspect", tmp_path)[::2] == (0, True)


def test_it_is_run_as_a_module():
    command = [sys.executable, "-m", "tokengate", "--version"]
    assert subprocess.check_output(command, text=True) == f"tokengate {tokengate.__version__}\n"


def test_its_methods_and_defaults_are_the_library_s():
    from tokengate import command_line
    from tokengate.gates.registry import options_of
    from tokengate.methods.registry import METHODS

    own = {name for name, kind in METHODS.kinds.items() if kind.__module__.startswith("tokengate.")}
    assert own == {*command_line.METHODS}
    ranks = {name: options_of(METHODS.kinds[name])["rank"] for name in own}
    assert ranks == {"lora": 8, "dora": 8, "adalora": 12, "adapter": 32}
    assert options_of(METHODS.kinds["adapter"])["activation"] == "relu"


@pytest.mark.parametrize("name", ["inspect", "diff", "plan", "report", "export", "import"])
def test_each_command_s_help_has_an_example_that_parses_and_defaults(name, capsys):
    from tokengate.command_line import parser

    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    (example,) = (line for line in text.splitlines() if line.startswith(f"  tokengate {name} "))
    assert parser().parse_args(example.split()[1:]).command == name
    if name == "import":
        assert "lambda of every layer (default: 1e-05)" in text
        assert "of every layer (default: 0.0)" in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text
