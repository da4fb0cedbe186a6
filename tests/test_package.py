"""The package itself: what importing it loads, and what it ships."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import user_program
from places import ROOT

import tokengate

HOSTS = ["transformers", "timm", "open_clip", "matplotlib", "sklearn", "peft", "accelerate", "trl"]
HOSTS += ["lightning", "pytorch_lightning", "huggingface_hub"]


def loaded_by(code):
    """The host libraries that a fresh interpreter has loaded after `code`."""
    code += f"\nimport sys\nprint([h for h in {HOSTS} if h in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(run.stdout.splitlines()[-1])


# The integrations that look at models without importing their library, and those that import it.
WITHOUT_HOST, WITH_HOST = (
    [
        *("attention", "callbacks", "hf_peft.exporting", "hf_peft.format", "hf_peft.importing"),
        *("hf_peft.linear_pattern", "hf_peft.names", "hf_peft.parameters", "hf_peft.pruned_rows"),
        *("hf_peft.reading", "hf_peft.writing", "hub", "language", "live_logging", "llava"),
        *("model_configs", "roles"),
    ],
    [
        *("clip", "lightning_callback", "plots"),
        *("trainer.callback", "trainer.checkpoints", "trainer.engines", "trainer.gradients"),
        *("trainer.penalty_unit", "trainer.quantised", "trainer.sharded_steps"),
        *("trainer.sparsity_logs", "trainer.surroundings", "trainer.tau_steps"),
        *("trainer.trainer", "trainer.zero", "trl.trainers", "trl.views", "vision"),
    ],
)


def test_importing_tokengate_imports_no_host():
    names = [f"tokengate.integrations.{name}" for name in WITHOUT_HOST]
    assert loaded_by(f"import {', '.join(names)}\nfrom tokengate import patch") == []
    files = [p.relative_to(ROOT / "integrations") for p in (ROOT / "integrations").rglob("*.py")]
    on_disk = {".".join(f.with_suffix("").parts) for f in files if f.stem != "__init__"}
    assert on_disk == {*WITHOUT_HOST, *WITH_HOST}


def test_the_import_test_can_fail():
    pytest.importorskip("matplotlib", reason="the viz extra is not installed")
    assert "matplotlib" in loaded_by("import tokengate, matplotlib")


def test_public_names():
    assert tokengate.layers is vars(tokengate)["layers"]  # and with it all others
    public = {name for name in dir(tokengate) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(tokengate, name), type(sys))}
    assert public - modules == {
        "Gate",
        "History",
        "Modification",
        "PatchView",
        "RankAllocator",
        "Slices",
        "SparsityReport",
        "SparsitySchedule",
        "TauAdam",
        "TokenGate",
        "TokenGateError",
        "TokenView",
        "after",
        "calibrate",
        "clip_grad_norm_",
        "compare",
        "count",
        "disabled",
        "drift",
        "export_changes",
        "fisher_scores",
        "fold",
        "follow",
        "layers",
        "load",
        "merge_and_unload",
        "modification_norms",
        "orthogonality",
        "param_groups",
        "patch",
        "record",
        "register",
        "register_gate",
        "restrict",
        "save",
        "scale_penalty",
        "select",
        "suggest",
        "token_gate",
        "unpatch",
        "use",
        "verify",
    }
    assert set(tokengate.__all__) == public - modules  # what `from tokengate import *` gives


@pytest.mark.parametrize(
    ("wing", "names"),
    [
        (
            "errors",
            [
                "DifferentBaseWarning",
                "FrozenAdapterWarning",
                "FrozenHeadWarning",
                "KernelsWarning",
                "LeftOutWarning",
                "MixedPositionsWarning",
                "NonFiniteWarning",
                "OtherRuleWarning",
                "RankWarning",
                "SavedWithBaseWarning",
                "SkippedModuleWarning",
                "StillGatedWarning",
                "UnenteredContextWarning",
                "UnreachedLayerWarning",
                "UnreachedSparsityWarning",
            ],
        ),
        ("methods", ["AdaLoRA", "Adapter", "DoRA", "LoRA", "Modification", "register"]),
        ("kernels", ["Factors"]),
        ("layers", ["GatedLinear"]),
        ("adapters", ["Folding"]),
        ("reports", ["Drift", "ModificationNorms"]),
    ],
)
def test_what_few_need_is_in_its_wing(wing, names):
    module = importlib.import_module(f"tokengate.{wing}")
    assert all(hasattr(module, name) for name in names)
    alone = {*names} - {"Modification", "register"}
    assert not any(hasattr(tokengate, name) for name in alone)


WINGS = [
    *("adapters", "files", "gates", "kernels", "layers", "linears", "methods", "patching"),
    *("reports", "training"),
]


def test_the_house_is_in_order():
    root = {path.stem for path in (ROOT / "tokengate").glob("*.py")}
    assert root == {
        "__init__",
        "errors",
        "arguments",
        "names",
        "patterns",
        "sharding",
        "command_line",
        "commands",
        "contexts",
        "public",
        "__main__",
    }
    folders = [p for p in (ROOT / "tokengate").iterdir() if p.is_dir() and p.name[0] != "_"]
    assert sorted(folder.name for folder in folders if not folder.is_symlink()) == WINGS
    for file in (ROOT / "tokengate").rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 330, file
    for top in ("tokengate", "integrations", "examples", "tests"):
        for folder in (ROOT / top, *(p for p in (ROOT / top).rglob("*") if p.is_dir())):
            assert len({*folder.glob("*.py")} - {folder / "__init__.py"}) <= 15, folder


@pytest.mark.parametrize(
    "wing", [*WINGS, *(f"reports/{each}" for each in ("effects", "page", "tables"))]
)
def test_a_wing_says_what_it_is_may_import_and_begins_with(wing):
    text = ast.get_docstring(ast.parse((ROOT / "tokengate" / wing / "__init__.py").read_text()))
    assert "import" in text.lower()
    first = re.search(r"Open `(\w+\.py)`", text)
    assert (ROOT / "tokengate" / wing / first[1]).exists()


def lint_imports(folder):
    """What import-linter says of the project in `folder`, and its exit code."""
    pytest.importorskip("importlinter", reason="the test extra is not installed")
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr


@pytest.fixture
def copied(tmp_path):
    """The library and its contracts, to be spoiled."""
    shutil.copytree(ROOT / "tokengate", tmp_path / "tokengate")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_one_way(copied):
    code, said = lint_imports(copied)
    assert code == 0, said
    assert "2 kept, 0 broken" in said


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("kernels/norms.py", "import tokengate.gates.tally", "tokengate.kernels is not allowed"),
        ("files/strict_json.py", "import tokengate.adapters", "tokengate.files is not allowed"),
        ("methods/lora.py", "from tokengate.layers.rows import Rows", "tokengate.methods is not"),
        ("reports/report.py", "import matplotlib", "tokengate is not allowed to import matplotlib"),
        ("new_wing.py", "", "new_wing"),
    ],
)
def test_the_contracts_can_fail(copied, file, line, broken):
    path = copied / "tokengate" / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    code, said = lint_imports(copied)
    assert code != 0
    assert broken in said, said


def test_the_core_imports_torch_safetensors_and_the_standard_library():
    for file in (ROOT / "tokengate").rglob("*.py"):
        # Triton comes with torch where there are GPUs, and is imported for one alone.
        own = {"triton"} if file.parent.name == "triton" else set()
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            roots = {n.split(".")[0] for n in names} - {"tokengate", "torch", "safetensors"} - own
            assert roots <= set(sys.stdlib_module_names), (file, roots)


def test_the_lowest_versions_tested_are_those_promised():
    """Each version in .ci/lowest.txt is a lower bound of pyproject.toml."""
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    text = (ROOT / "pyproject.toml").read_text()
    promised = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text.split("examples = ")[0]))
    promised |= dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text.split("\ntest = ")[1]))
    assert {"torch", "safetensors", "transformers"} <= tested.keys()
    for name, version in tested.items():
        assert version in (promised[name], f"{promised[name]}.0"), name


def unpickling(text):
    """The calls that may run what is in a file."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
        and "weights_only=True" not in ast.unparse(node)
    ]


def test_no_file_is_unpickled():
    assert unpickling("x = torch.load(file, weights_only = False)")
    folders = ("tokengate", "integrations", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert any("weights_only=True" in file.read_text() for file in files)
    assert [call for file in files for call in unpickling(file.read_text())] == []


def test_the_integrations_are_in_the_package_by_a_link():
    """So that whoever puts the root on the path, as an editable install does, finds them."""
    assert os.readlink(ROOT / "tokengate" / "integrations") == "../integrations"
    for top in ("tokengate", "integrations"):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_it_is_found_from_beside_a_folder_of_its_name(tmp_path):
    """As in the folder where one has cloned it."""
    (tmp_path / "tokengate").mkdir()
    code = (
        "from importlib.util import find_spec\nfrom pathlib import Path\n"
        "spec = find_spec('tokengate')\n"
        "print(spec.origin, (Path(spec.origin).parent / 'integrations' / 'roles.py').exists())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.split() == [tokengate.__file__, "True"], run.stderr


def test_the_users_program():
    """Its types are checked in .ci/run, where the package is installed as users install it."""
    assert 0 < user_program.main() < 1


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("examples", ["examples"]),
        ("examples/analysis", ["examples"]),
        ("examples/recipes", ["examples"]),
        ("examples/benchmarks", ["examples", "test"]),
    ],
)
def test_the_extras_of_the_examples_are_what_they_import(folder, extras):
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]

    def extra(name):
        return ast.literal_eval(text.split(f"\n{name} = ")[1].split("]\n")[0] + "]")

    wanted = []
    for each in extras:
        first, *own = extra(each)
        wanted += own
        for name in first.removeprefix("tokengate[").removesuffix("]").split(","):
            wanted += extra(name)
    installed = {requirement.split(">=")[0] for requirement in wanted}
    files = list((ROOT / folder).glob("*.py"))
    imported = set()
    for file in files:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    own = (file.stem for file in (ROOT / "examples").rglob("*.py"))
    known = {"tokengate", "torch", "safetensors", *own}
    # What another package brings along, and what is imported by another name.
    brought = {
        "sklearn": "scikit-learn", "numpy": "scikit-learn", "scipy": "scikit-learn",
        "tokenizers": "transformers", "PIL": "timm",
    }  # fmt: skip
    imported = {brought.get(name, name) for name in imported}
    assert imported - known - set(sys.stdlib_module_names) <= installed


def test_triton_is_not_imported_without_a_gpu():
    script = """
import sys, torch
class Refused:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refused())
import tokengate
model = tokengate.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), "all-linear", "dora", rank=2)
model(torch.randn(3, 4)).sum().backward()
assert "tokengate.kernels.fused" in sys.modules
assert "tokengate.kernels.triton" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
