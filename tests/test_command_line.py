"""The command `tokengate`: what it says of adapters and models, what it writes, how it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from models import Net, away_from_initialisation
from places import ROOT
from safetensors.torch import load_file, save_file

import tokengate
from tokengate.adapters.planning import plan_text
from tokengate.command_line import main


def run(capsys, *arguments):
    """What it printed; it must have gone well and warned of nothing."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *arguments):
    """The one sentence on stderr, after which nothing is printed."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tokengate {arguments[0]}: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


def saved(folder, method="lora", taus=(0.1, 0.2, 0.3, -0.5), seed=0, train=(), **options):
    torch.manual_seed(seed)
    model = tokengate.patch(Net(), ["q_proj", "fc1"], method, train=train, **options)
    away_from_initialisation(model)
    for layer, tau in zip(tokengate.layers(model).values(), taus, strict=False):
        if layer.gate is not None:
            layer.gate.tau.data.fill_(tau)
    tokengate.save(model, folder)
    return model


def test_inspect(tmp_path, capsys):
    model = saved(tmp_path, rank={"*.q_proj": 2, "*": 3}, train=["head"], dropout=0.1)
    found = json.loads(run(capsys, "inspect", tmp_path, "--json"))
    assert found["methods"] == {"lora": 4}
    assert found["base_class"] == "models.Net"
    assert found["saved_by"] == f"tokengate {tokengate.__version__}"
    assert found["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["trained_beside"] == {"head.bias": [3], "head.weight": [3, 8]}
    assert found["asked"][0]["targets"] == ["q_proj", "fc1"]
    assert found["gated_layers"] == 4
    # In the model's order: q_proj, fc1, q_proj, fc1.
    expected = {
        "min": -0.5, "quartile_1": -0.05, "median": 0.15, "quartile_3": 0.225, "max": 0.3,
        "share_above_0": 0.75,
    }  # fmt: skip
    assert found["tau"] == pytest.approx(expected)
    layer = found["layers"]["blocks.1.fc1"]
    assert (layer["in_features"], layer["out_features"], layer["parameters"]) == (8, 16, 72)
    assert layer["options"]["rank"] == 3
    assert layer["options"]["dropout"] == 0.1
    assert layer["tau"] == -0.5
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert found["bytes"] == sizes
    text = run(capsys, "inspect", tmp_path)
    assert "4 layers of lora, 4 gated" in text
    assert "above 0 in 75 % of the gates" in text
    assert "head.weight [3, 8]" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["q_proj", "lora", "2", "8", "->", "8", "2", "64", "0.1", "to", "0.3"] in rows
    assert ["fc1", "lora", "3", "8", "->", "16", "2", "144", "-0.5", "to", "0.2"] in rows


def test_inspect_without_gates_and_with_one(tmp_path, capsys):
    saved(tmp_path / "a", gate=False)
    found = json.loads(run(capsys, "inspect", tmp_path / "a", "--json"))
    assert found["tau"] is None
    assert "tau" not in run(capsys, "inspect", tmp_path / "a").split("projection")[1]
    tokengate.save(tokengate.patch(Net(), ["blocks.0.fc1"], tau=0.5), tmp_path / "b")
    tau = json.loads(run(capsys, "inspect", tmp_path / "b", "--json"))["tau"]
    assert set(tau.values()) == {0.5, 1.0}


def test_inspect_shows_a_method_that_is_not_registered_here(tmp_path, capsys, monkeypatch):
    from tokengate.methods import registry

    monkeypatch.setattr(registry.METHODS, "kinds", dict(registry.METHODS.kinds))

    @tokengate.register("own")
    class Own(tokengate.methods.LoRA):
        pass

    tokengate.save(tokengate.patch(Net(), ["fc1"], "own"), tmp_path)
    del registry.METHODS.kinds["own"]
    assert "2 layers of own" in run(capsys, "inspect", tmp_path)


def test_diff(tmp_path, capsys):
    saved(tmp_path / "a", train=["head"])
    same = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "a", "--json"))
    assert {layer["distance"] for layer in same["layers"].values()} == {0.0}
    assert "6 with equal values" in run(capsys, "diff", tmp_path / "a", tmp_path / "a")

    model = saved(tmp_path / "x", train=["head"])
    layers = tokengate.layers(model)
    with torch.no_grad():
        layers["blocks.0.fc1"].modification.B.mul_(2)
        layers["blocks.1.fc1"].modification.B.mul_(1.01)
        layers["blocks.0.q_proj"].gate.tau.fill_(0.7)
        model.head.weight.mul_(3)
    tokengate.save(model, tmp_path / "b")
    found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json"))
    assert list(found["layers"])[:2] == ["blocks.0.fc1", "blocks.1.fc1"]
    a = load_file(tmp_path / "a" / "adapter_model.safetensors")
    down, up = (a[f"blocks.0.fc1.modification.{x}"].double().norm() for x in "AB")
    expected = (up / (down**2 + up**2).sqrt()).item()
    assert found["layers"]["blocks.0.fc1"]["distance"] == pytest.approx(expected)
    assert found["layers"]["blocks.0.q_proj"] == {"distance": 0.0, "tau": pytest.approx([0.1, 0.7])}
    assert found["trained_beside"]["head.weight"]["distance"] == pytest.approx(2)
    assert found["options"] == {}
    lines = run(capsys, "diff", tmp_path / "a", tmp_path / "b").splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("blocks", "head"))]
    assert names == ["blocks.0.fc1", "blocks.1.fc1", "blocks.0.q_proj", "head.weight"]
    assert lines[-1] == "2 with equal values"


def test_diff_of_zeros(tmp_path, capsys):
    for folder, bias in (("a", 0.0), ("b", 1.0)):
        model = tokengate.patch(Net(), ["fc1"], train=["head.bias"])
        torch.nn.init.constant_(model.head.bias, bias)
        tokengate.save(model, tmp_path / folder)
    for other, distance in (("a", 0.0), ("b", None)):
        found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / other, "--json"))
        assert found["trained_beside"] == {"head.bias": {"distance": distance}}


def test_diff_of_other_layers_and_options(tmp_path, capsys):
    saved(tmp_path / "a", rank=2)
    torch.manual_seed(0)
    other = tokengate.patch(Net(), ["fc1", "v_proj"], rank=4, gate=False, train=["head"])
    tokengate.save(other, tmp_path / "b")
    found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json"))
    assert found["only_in_a"] == ["blocks.0.q_proj", "blocks.1.q_proj"]
    assert found["only_in_b"] == [
        "blocks.0.v_proj", "blocks.1.v_proj", "head.bias", "head.weight",
    ]  # fmt: skip
    assert found["options"]["blocks.0.fc1"] == {
        "rank": [2, 4], "gate": ["threshold", None], "penalty": [1e-5, None],
    }  # fmt: skip
    layer = found["layers"]["blocks.0.fc1"]
    assert layer == {"distance": None, "tau": [pytest.approx(0.2), None]}
    text = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert "options of blocks.0.fc1 and 1 more: rank 2 in a, 4 in b" in text
    assert "only in b: head.weight" in text
    dora = tokengate.patch(Net(), ["fc1"], "dora", rank=2)
    tokengate.save(dora, tmp_path / "c")
    found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "c", "--json"))
    assert found["options"]["blocks.0.fc1"]["method"] == ["lora", "dora"]


def test_refusals_are_one_sentence(tmp_path, capsys):
    assert "does not exist" in refused(capsys, "inspect", tmp_path / "nowhere")
    assert "does not exist" in refused(capsys, "plan", tmp_path / "no", "--targets", "a")
    saved(tmp_path)
    assert "does not exist" in refused(capsys, "diff", tmp_path, tmp_path / "nowhere")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "safetensors" in refused(capsys, "inspect", tmp_path)


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


# What needs a model of transformers.


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the transformers extra is not installed")


def llama3_8b(transformers):
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def llava_7b(transformers):
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = transformers.LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    # Without architectures, so that the class is found by the kind of configuration.
    return transformers.LlavaConfig(vision_config=vision, text_config=text, dtype="float16")


# Not getrusage's: Linux hands a process the peak of the one that started it, which here has run
# many tests.
PEAK = """
import pathlib, re, sys
from tokengate.command_line import main
code = main(sys.argv[1:])
status = pathlib.Path("/proc/self/status").read_text()
print(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1], file=sys.stderr)
sys.exit(code)
"""


def run_apart(*arguments):
    """What it printed as JSON, and the most memory that the process had, in bytes."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), 1024 * int(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def large_parent():
    """So that the tests below see what the process itself takes, not what its parent once had."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells the peak of one process")
    torch.ones(3 * 2**28)  # 3 GiB, given back at once


def test_plan_of_llama3_8b_takes_no_memory(transformers, tmp_path, large_parent):
    llama3_8b(transformers).save_pretrained(tmp_path)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    found, peak = run_apart("plan", tmp_path, "--targets", *targets, "--rank", 32, "--scale", 0.5)
    assert peak < 2 * 1024**3
    base = 8_030_261_248  # as published
    adapters = 32 * 32 * (8192 + 2 * (4096 + 1024) + 2 * (4096 + 14336))
    assert found["modifications"] == adapters
    assert found["taus"] == len(found["layers"]) == 160
    assert found["trainable"] == adapters + 160
    assert found["parameters"] == base + adapters + 160
    assert found["trainable_share"] == (adapters + 160) / (base + adapters + 160)
    trained = 4 * (adapters + 160)
    assert found["bytes"] == {
        "frozen parameters": 2 * base,
        "trained parameters": trained,
        "gradients": trained,
        "Adam's states": 2 * trained,
    }
    assert found["bytes"]["frozen parameters"] > 4 * peak  # the test can fail
    assert f"\n{plan_text(found)}\n```" in (ROOT / "docs" / "command_line.md").read_text()


def test_plan_of_llava_7b_takes_no_memory(transformers, tmp_path, large_parent):
    llava_7b(transformers).save_pretrained(tmp_path)
    found, peak = run_apart("plan", tmp_path / "config.json", "--roles", "q", "v")
    assert peak < 2 * 1024**3
    assert found["model"].endswith(".LlavaForConditionalGeneration")
    assert len(found["layers"]) == 64
    assert all("language_model" in name for name in found["layers"])
    assert found["modifications"] == 64 * 8 * (4096 + 4096)
    assert found["bytes"]["frozen parameters"] > 4 * peak


def tiny(transformers, folder, **more):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, **more,
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).eval()


def test_plan_with_options(transformers, tmp_path, capsys):
    tiny(transformers, tmp_path)
    text = run(
        capsys, "plan", tmp_path, "--targets", "all-linear", "--method", "adapter", "--rank", "2",
        "--activation", "gelu", "--dropout", "0.1", "--train", "lm_head", "--exclude", "mlp",
        "--no-gate",
    )  # fmt: skip
    assert "LlamaForCausalLM: 8 layers would be patched" in text
    assert "trained beside: lm_head.weight [64, 32]" in text
    assert "options: rank=2, scale=0.5, activation=gelu, dropout=0.1" in text
    assert " 0 taus" in text
    assert "Adam's states" in text
    text = run(
        capsys, "plan", tmp_path, "--targets", "q_proj", "--alpha", "4", "--rslora",
        "--architecture", "LlamaForSequenceClassification",
    )  # fmt: skip
    assert "LlamaForSequenceClassification: 2 layers" in text
    assert "alpha=4.0, rslora=True" in text


def test_plan_refuses(transformers, tmp_path, capsys):
    tiny(transformers, tmp_path)
    text = refused(capsys, "plan", tmp_path, "--targets", "q_prj")
    assert "q_prj" in text
    assert "q_proj" in text
    assert "'qq'" in refused(capsys, "plan", tmp_path, "--roles", "qq")
    timm = ["plan", "timm:vit_tiny_patch16_224", "--targets", "qkv", "--architecture", "Llama"]
    assert "'Llama' was asked of 'timm:vit_tiny_patch16_224'" in refused(capsys, *timm)
    text = refused(capsys, "plan", tmp_path, "--targets", "q_proj", "--architecture", "Llama")
    assert "no model class 'Llama'" in text
    assert "method='b' is unknown" in refused(
        capsys, "plan", tmp_path, "--targets", "a", "--method", "b"
    )
    for content in ('{"model_type": "nothing"}', "{}", "[", "3"):
        (tmp_path / "config.json").write_text(content)
        text = refused(capsys, "plan", tmp_path, "--targets", "q_proj")
        assert "no configuration that transformers" in text


def test_plan_of_a_model_of_timm(capsys):
    pytest.importorskip("timm", reason="the timm extra is not installed")
    name = "timm:vit_tiny_patch16_224"
    found = json.loads(run(capsys, "plan", name, "--roles", "q", "v", "--train", "head", "--json"))
    assert len(found["layers"]) == 24
    assert found["trained_beside"] == {"head.weight": [1000, 192], "head.bias": [1000]}
    text = refused(capsys, "plan", "timm:vit_tinny_patch16_224", "--targets", "qkv")
    assert "no model 'vit_tinny_patch16_224'" in text
    mixer = ["plan", "timm:mixer_s32_224", "--targets", "mlp_tokens.fc1"]
    assert main(mixer) == 0
    assert "warning: " in capsys.readouterr().err
    assert main(["plan", name, "--targets", "proj"]) == 0  # of attention, and a convolution
    assert "patch_embed.proj" in capsys.readouterr().out


def test_export_and_import(transformers, tmp_path, capsys):
    base = tiny(transformers, tmp_path / "base")
    model = tokengate.patch(base, ["q_proj", "mlp.up_proj"], "dora", rank=3, tau=0.3)
    away_from_initialisation(model)
    tokengate.save(model, tmp_path / "ours")
    convert = ["export", tmp_path / "ours", tmp_path / "theirs", "--base", tmp_path / "base"]
    assert "tau above 0 in 4 of 4" in refused(capsys, *convert)
    assert not (tmp_path / "theirs").exists()
    run(capsys, *convert, "--ungated", "--base-model-name", "some/llama")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/llama"
    found = json.loads(run(capsys, "inspect", tmp_path / "theirs", "--json"))
    assert "PEFT" in found["saved_by"]
    assert found["methods"] == {"dora": 4}
    assert found["base_class"] == "some/llama"
    apart = json.loads(run(capsys, "diff", tmp_path / "ours", tmp_path / "theirs", "--json"))
    assert {layer["distance"] for layer in apart["layers"].values()} == {0.0}
    assert "Hugging Face PEFT" in run(capsys, "inspect", tmp_path / "theirs")

    back = ["import", tmp_path / "theirs", tmp_path / "again", "--base", tmp_path / "base"]
    run(capsys, *back, "--tau", "0.3", "--penalty", "0.25")
    one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = tiny(transformers, tmp_path / "base")
    ids = torch.arange(6)[None]
    before = other(ids).logits
    tokengate.load(other, tmp_path / "again")  # and no warning of another base
    assert tokengate.layers(other)["model.layers.0.mlp.up_proj"].gate.penalty == 0.25
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert not torch.equal(other(ids).logits, before)

    run(capsys, *back, "--no-gate")
    assert json.loads(run(capsys, "inspect", tmp_path / "again", "--json"))["tau"] is None
    text = refused(capsys, "import", tmp_path / "theirs", tmp_path / "theirs", *back[3:])
    assert "would be replaced" in text
    assert "is ours, which tokengate.load" in refused(
        capsys, "import", tmp_path / "ours", tmp_path / "x", *back[3:]
    )
    text = refused(capsys, "export", tmp_path / "theirs", tmp_path / "x", *back[3:])
    assert "Hugging Face PEFT" in text


def test_export_for_another_base_warns_or_refuses(transformers, tmp_path, capsys):
    model = tokengate.patch(tiny(transformers, tmp_path / "base"), ["layers.0.self_attn.q_proj"])
    tokengate.save(model, tmp_path / "ours")
    tiny(transformers, tmp_path / "other", tie_word_embeddings=True, attention_bias=True)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    arguments = ["export", tmp_path / "ours", tmp_path / "out", "--base", tmp_path / "other"]
    assert main([str(a) for a in arguments]) == 0
    assert "export: warning: the adapter in" in capsys.readouterr().err
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "(32, 32)" in refused(capsys, *arguments)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nforged: line", "\x9b2J", "\u202egnp", "\x7f"])
def test_names_of_strangers_are_shown_and_not_obeyed(tmp_path, capsys, name):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    for folder, scale in (("a", 1), ("b", 2)):
        tokengate.patch(model, "all-linear", rank=2, train=["b"], scale=scale)
        away_from_initialisation(model)
        tokengate.save(model, tmp_path / folder)
        tokengate.unpatch(model)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(name in key for key in weights)
    for arguments in (["inspect", tmp_path / "a"], ["diff", tmp_path / "a", tmp_path / "b"]):
        text = run(capsys, *arguments)
        assert all(line.isprintable() for line in text.split("\n"))
        assert not any(line.startswith("forged") for line in text.split("\n"))
        assert run(capsys, *arguments, "--json").replace("\n", "").isprintable()
    weights.pop(next(key for key in weights if name in key))
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    assert refused(capsys, "inspect", tmp_path / "a").strip().isprintable()


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


# How it is called.


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


def test_plan_says_the_dtype_it_assumed(transformers, tmp_path, capsys):
    tiny(transformers, tmp_path)
    arguments = ["plan", tmp_path, "--targets", "all_linear", "--method", "LoRA"]
    text = run(capsys, *arguments)
    assert "frozen parameters taken as float32" in text
    smaller = run(capsys, *arguments, "--dtype", "bfloat16")
    assert "frozen parameters taken as bfloat16" in smaller
    sizes = [
        json.loads(run(capsys, *arguments, "--json", *more))["bytes"]["frozen parameters"]
        for more in ((), ("--dtype", "bfloat16"))
    ]
    assert sizes[0] == 2 * sizes[1]


def test_report(tmp_path, capsys):
    model = tokengate.patch(Net(), ["q_proj"], tau=0.1)
    with tokengate.record(model) as rec:
        model(torch.randn(2, 3, 8))
    path = tmp_path / "report.json"
    rec.report().save(path)
    assert run(capsys, "report", path) == f"{rec.report()}\n"
    assert json.loads(run(capsys, "report", path, "--json"))["modules"].keys() == {
        "blocks.0.q_proj", "blocks.1.q_proj",
    }  # fmt: skip
    assert "report.html: written" in run(capsys, "report", path, "--html")
    assert 'role="tablist"' in (tmp_path / "report.html").read_text()
    run(capsys, "report", path, "--html", tmp_path / "other.html")
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "report.html").read_bytes()
    (tmp_path / "sub").mkdir()
    before = path.read_bytes()
    for itself in (path, tmp_path / "." / "sub" / ".." / "report.json"):
        assert "is the report itself" in refused(capsys, "report", path, "--html", itself)
    assert path.read_bytes() == before
    with pytest.raises(SystemExit):  # of two forms one would have been left out, silently
        main(["report", str(path), "--html", "--json"])
    path.write_text("{}")
    assert "is no report" in refused(capsys, "report", path)


def test_sentences_name_options_of_the_command(transformers, tmp_path, capsys):
    """Where the library's name an argument."""
    base = tiny(transformers, tmp_path / "base")
    model = tokengate.patch(base, ["q_proj"], rank=2, tau=0.3)
    away_from_initialisation(model)
    tokengate.save(model, tmp_path / "ours")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    convert = ["export", tmp_path / "ours", tmp_path / "theirs", "--base", tmp_path / "base"]
    text = refused(capsys, *convert)
    assert "or pass --no-strict to skip what does not fit" in text
    assert "strict=False" not in text
    assert main([str(a) for a in [*convert, "--no-strict", "--ungated"]]) == 0
    assert "left out: model.layers.1.self_attn.q_proj " in capsys.readouterr().out
    assert "--ungated" in refused(capsys, *convert, "--no-strict")
