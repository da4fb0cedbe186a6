"""What the commands say and write that are given a base model: plan, export, import."""

import json
import subprocess
import sys

import pytest
import torch
from commands import refused, run
from models import away_from_initialisation
from places import ROOT
from safetensors.torch import load_file

import tokengate
from tokengate.adapters.planning import plan_text
from tokengate.command_line import main


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


def tiny(transformers, folder, **more):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, **more,
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).eval()


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
