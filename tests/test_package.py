"""The package itself: what importing it loads, and what it ships."""

import ast
import pathlib
import subprocess
import sys

import pytest

import tokengate

ROOT = pathlib.Path(__file__).parents[1]
HOSTS = ["transformers", "timm", "open_clip", "matplotlib", "sklearn", "peft", "accelerate"]


def loaded_by(code):
    """The host libraries that a fresh interpreter has loaded after `code`."""
    code += f"\nimport sys\nprint([h for h in {HOSTS} if h in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(run.stdout.splitlines()[-1])


# The integrations that look at models without importing their library, and those that import it.
WITHOUT_HOST, WITH_HOST = (
    [
        *("attention", "hf_peft", "language", "live_logging", "llava"),
        *("model_configs", "peft_format", "peft_reading", "peft_writing", "roles", "tau_steps"),
    ],
    ["clip", "penalty_unit", "plots", "sparsity_logs", "trainer", "trainer_callback", "vision"],
)


def test_importing_tokengate_imports_no_host():
    names = [f"tokengate.integrations.{name}" for name in WITHOUT_HOST]
    assert loaded_by(f"import tokengate, {', '.join(names)}") == []
    on_disk = {path.stem for path in (ROOT / "integrations").glob("*.py")} - {"__init__"}
    assert on_disk == {*WITHOUT_HOST, *WITH_HOST}


def test_the_import_test_can_fail():
    pytest.importorskip("matplotlib", reason="the viz extra is not installed")
    assert "matplotlib" in loaded_by("import tokengate, matplotlib")


def test_public_names():
    public = {name for name in vars(tokengate) if not name.startswith("_")}
    modules = {name for name in public if isinstance(vars(tokengate)[name], type(sys))}
    assert public - modules == {
        "AdaLoRA",
        "Adapter",
        "DifferentBaseWarning",
        "DoRA",
        "Factors",
        "Folding",
        "GatedLinear",
        "History",
        "LoRA",
        "MixedPositionsWarning",
        "Modification",
        "ModificationNorms",
        "PatchView",
        "RankAllocator",
        "Slices",
        "SparsityController",
        "SparsityReport",
        "TauAdam",
        "TokenGate",
        "TokenGateError",
        "TokenView",
        "UnreachedLayerWarning",
        "calibrate",
        "disabled",
        "fold",
        "layers",
        "load",
        "modification_norms",
        "orthogonality",
        "param_groups",
        "patch",
        "record",
        "register",
        "save",
        "scale_penalty",
        "select",
        "token_gate",
        "unpatch",
        "use",
        "verify",
    }


def test_imports_point_one_way():
    """A file may import only files above it in this list."""
    order = [
        "errors",
        "accelerate_hooks",
        "arguments",
        "precision",
        "patterns",
        "tally",
        "sharding",
        "recomputation",
        "eager",
        "gate",
        "gated_sum",
        "factors",
        "by_name",
        "experts",
        "quantised",
        "slices",
        "linear_like",
        "all_or_nothing",
        "class_swap",
        "dequantised",
        "modifications",
        "rows",
        "gated_linear",
        "sliced_linear",
        "merged_weight",
        "folded",
        "named_adapters",
        "fused",
        "slice_targets",
        "batches",
        "measuring",
        "coverage",
        "sequence_first",
        "padding",
        "fast_path",
        "owners",
        "mixing",
        "targets",
        "options",
        "patching",
        "scale_penalty",
        "orthogonality",
        "rank_allocator",
        "sparsity_controller",
        "tau_adam",
        "param_groups",
        "text_table",
        "atomic_write",
        "strict_json",
        "histogram",
        "sparsity_table",
        "module_sparsity",
        "report_difference",
        "sample_views",
        "html_report",
        "html_table",
        "report",
        "call_store",
        "samples",
        "position_counts",
        "recording",
        "history",
        "selection",
        "adapter_config",
        "adapter_folder",
        "saving",
        "fitting",
        "loading",
        "calibration",
        "modification_norms",
        "folding",
        "inspection",
        "difference",
        "planning",
        "command_line",
    ]
    found = {p.stem for p in (ROOT / "tokengate").glob("*.py")} | {"modifications"}
    assert found - {"__init__"} == set(order)
    for name in order:
        path = ROOT / "tokengate" / name
        files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokengate"):
                    imported = node.module.split(".")[1]
                    assert order.index(imported) <= order.index(name), (file, imported)
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module]
                roots = {n.split(".")[0] for n in names} - {"tokengate", "torch", "safetensors"}
                assert roots <= set(sys.stdlib_module_names), (file, roots)


def test_packages_on_disk_are_the_packages_listed():
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(text.split("packages = ")[1].split("\n")[0])
    on_disk = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("tokengate/**/__init__.py")
    }
    on_disk |= {"tokengate.integrations"}
    assert set(listed) == on_disk
    assert (ROOT / "integrations" / "__init__.py").exists()
    data = ast.literal_eval(text.split("package-data]\ntokengate = ")[1].split("\n")[0])
    for file in (ROOT / "tokengate").iterdir():
        if file.is_file() and file.suffix != ".py":
            assert any(map(file.match, data)), file
    assert f'version = "{tokengate.__version__}"' in text


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("examples", ["examples"]), ("examples/benchmarks", ["examples", "test"])],
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
    known = {"tokengate", "torch", "safetensors", *(file.stem for file in files)}
    # What another package brings along, and what is imported by another name.
    brought = {
        "sklearn": "scikit-learn", "numpy": "scikit-learn", "scipy": "scikit-learn",
        "tokenizers": "transformers", "PIL": "timm",
    }  # fmt: skip
    imported = {brought.get(name, name) for name in imported}
    assert imported - known - set(sys.stdlib_module_names) <= installed
