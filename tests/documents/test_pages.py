"""Every page's Python runs as it stands, offline: tiny models take the place of downloaded ones."""

import re
import socket
from contextlib import nullcontext

import pytest
import torch
from code_blocks import page, python_of, run
from models import away_from_initialisation
from places import ROOT
from small_llama import Tokenizer, small_llama

import tokengate
from tokengate import errors

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

# package_index.md repeats README, which test_readme.py runs.
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").glob("*.md")
    if python_of(path.read_text()) and path.stem != "package_index"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def model(name, dtype=torch.float32):
        return small_llama().to(dtype)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())


def check_training(scope, printed, folder):
    assert len(tokengate.layers(scope["model"])) == 4
    assert "sparsity (%)" in printed


def check_methods(scope, printed, folder):
    assert sum(scope["allocator"].ranks.values()) == 8
    assert str(scope["allocator"].ranks) in printed
    assert isinstance(scope["model"][0].modification, scope["Diagonal"])


def check_gates(scope, printed, folder):
    lines = printed.splitlines()
    assert 0.4 < float(lines[0]) < 0.6
    assert 0.3 < float(lines[1].split("} ")[1]) < 0.7
    assert isinstance(scope["model"][0].gate, scope["BySize"])


def check_positions(scope, printed, folder):
    model, x, suffix = scope["model"], scope["x"], scope["suffix"]
    away_from_initialisation(model)
    with tokengate.disabled(model):
        base = model(x)
    with tokengate.restrict(model, suffix):
        found = model(x)
    assert torch.equal(found[~suffix], base[~suffix])
    assert not torch.equal(found[suffix], base[suffix])


def check_adapters(scope, printed, folder):
    assert (folder / "outputs" / "adapter" / "tokengate_config.json").exists()
    assert "1 kept" in printed
    assert list(tokengate.layers(scope["model"])) == ["0"]


def check_reports(scope, printed, folder):
    assert (
        f'"tokens":{scope["words"]}'.replace("'", '"').replace(", ", ",")
        in (folder / "outputs" / "report.html").read_text()
    )
    assert {path.name for path in folder.glob("*.png")} == {"sparsity.png", "trajectories.png"}
    assert scope["history"].steps == list(range(0, 100, 10))
    assert scope["history"].sparsity[-1] > 0


def check_distributed(scope, printed, folder):
    """On one process, which sees whether it runs; tests/training/test_distributed.py has two."""
    assert {m.positions for m in scope["report"].modules.values()} == {6}
    for layer in tokengate.layers(scope["model"]).values():
        assert layer.gate.tau.full_tensor().item() == pytest.approx(4e-5, rel=1e-3)


def check_targets(scope, printed, folder):
    lines = printed.splitlines()
    both = "['text.q_proj', 'text.v_proj']"
    assert lines[0] == lines[2] == lines[3] == both
    assert lines[1] == "['text.out']"
    assert lines[4] == lines[5] == "['text.q_proj', 'text.v_proj', 'text.out']"
    assert "query" in lines[6]
    assert lines[7] == "['qkv.q', 'qkv.v']"


def check_get_started(scope, printed, folder):
    first, second = re.findall(r"^sparsity ([\d.]+) %", printed, re.MULTILINE)
    assert 30 < float(first) < 70
    assert 10 < float(second) < float(first)
    assert "torch.Size([16, 20])" in printed
    assert list(tokengate.layers(scope["model"])) == ["1", "3"]


def check_coming_from_peft(scope, printed, folder):
    assert printed.count("2,048") == 2  # both count the same modification
    for file in ("with_peft", "for_peft"):
        assert (folder / "outputs" / file / "adapter_model.safetensors").exists()
    assert len(tokengate.layers(scope["model"])) == 4


CHECKS = {
    f"docs/{name.removeprefix('check_')}.md": check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


@pytest.fixture
def one_process(monkeypatch):
    """What a launcher says, for a group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    joining = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in joining.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs(name, one_thread, one_process, capsys, tmp_path):
    if "coming_from_peft" in name:
        pytest.importorskip("peft", reason="the test extra is not installed")
    if "reports" in name:
        pytest.importorskip("matplotlib", reason="the viz extra is not installed")
    scope = {}
    if "distributed" in name:
        ids = torch.arange(3, 9)[None]
        scope = {"model": small_llama(), "batch": {"input_ids": ids, "labels": ids}}
    # Which says so.
    warned = pytest.warns(errors.SkippedModuleWarning) if "models" in name else nullcontext()
    with warned:
        run(name, scope)
    if name in CHECKS:
        CHECKS[name](scope, capsys.readouterr().out, tmp_path)


def test_every_check_has_a_page():
    assert set(CHECKS) <= set(PAGES)


def test_a_page_that_is_wrong_fails(monkeypatch):
    monkeypatch.setattr("code_blocks.page", lambda name: "```python\ntokengate.pacth\n```\n")
    with pytest.raises(NameError):
        run("any", {})


def test_the_table_of_methods():
    from tokengate.gates.registry import options_of
    from tokengate.methods import registry

    rows = [line.split("|") for line in page("docs/methods.md").splitlines() if line[:4] == '| `"']
    options = {row[1].strip(' `"'): row[3] for row in rows}
    assert options["dora"].strip() == 'as `"lora"`'
    assert set(options) == {"lora", "dora", "adalora", "adapter"}
    for method in ("lora", "adalora", "adapter"):
        named = re.findall(r"`(\w+)`", options[method])
        assert named == list(options_of(registry.METHODS.find(method)))
