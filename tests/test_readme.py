"""The README's and the integrations' Python runs as printed, tiny models in place of large ones.

The pages of docs/ are run by tests/documents/.
"""

import importlib
import re
import socket

import pytest
import torch
from code_blocks import python_of
from models import snapshot
from places import ROOT
from small_llama import small_llama

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

README = (ROOT / "README.md").read_text()
CODE = python_of(README)


def test_it_is_a_page():
    """What is more goes into docs/."""
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loop_runs_offline_and_closes_some(one_thread, monkeypatch, tmp_path, capsys, seed):
    loop, keep = CODE[:2]
    assert len([line for line in loop.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", None)
    torch.manual_seed(seed)
    scope = {}
    exec(loop, scope)
    (sparsity,) = re.findall(r"^sparsity ([\d.]+) %", capsys.readouterr().out, re.MULTILINE)
    assert 1 < float(sparsity) < 99
    exec(keep, scope)
    assert (tmp_path / "outputs" / "adapter" / "tokengate_config.json").exists()
    with tokengate.disabled(scope["model"]):
        base = scope["model"](scope["tokens"])
    assert not torch.equal(scope["found"][scope["inside"]], base[scope["inside"]])


@pytest.mark.usefixtures("own_accelerate")
def test_the_trainer_in_eight_lines(monkeypatch, tmp_path):
    model, arguments = small_llama(), transformers.TrainingArguments
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    quiet["dataloader_pin_memory"] = False
    scope = {"tokengate": tokengate, "texts": Texts()}
    scope["TrainingArguments"] = lambda folder, **o: arguments(tmp_path, **o, **quiet)
    code, imported = CODE[2], "Trainer, TrainingArguments\n"
    assert len([line for line in code.splitlines() if line]) <= 8
    assert imported in code
    exec(code.replace(imported, "Trainer\n"), scope)
    assert len(tokengate.layers(model)) == 4
    for layer in tokengate.layers(model).values():
        assert layer.modification.B.abs().sum() > 0


def test_that_is_all_of_its_python():
    assert len(CODE) == 3


def test_the_api_table_names_what_there_is():
    table = (ROOT / "docs" / "names.md").read_text()
    called = "patch unpatch disabled restrict after register_gate layers "
    called += "param_groups follow clip_grad_norm_ TauAdam record RankAllocator orthogonality"
    for name in (
        *called.split(),
        "register",
        "verify",
        "Slices",
        "scale_penalty",
        "History",
        *["save", "load", "use", "fold", "calibrate", "select", "modification_norms"],
        *["compare", "export_changes"],
    ):
        assert f"`{name}(" in table
        assert hasattr(tokengate, name)
    others = (
        "Gate token_gate TokenGate SparsityReport TokenGateError Modification TokenView PatchView"
    )
    for name in others.split():
        assert f"`{name}" in table
        assert hasattr(tokengate, name)
    wings = {
        "adapters": ["Folding"],
        "errors": [
            "DifferentBaseWarning",
            "MixedPositionsWarning",
            "NonFiniteWarning",
            "OtherRuleWarning",
            "SkippedModuleWarning",
            "StillGatedWarning",
            "UnreachedLayerWarning",
            "UnreachedSparsityWarning",
        ],
        "kernels": ["Factors"],
        "layers": ["GatedLinear"],
        "methods": ["LoRA", "DoRA", "AdaLoRA", "Adapter"],
        "reports": ["ModificationNorms"],
    }
    for wing, names in wings.items():
        module = importlib.import_module(f"tokengate.{wing}")
        # The function `layers` hides the wing of that name as an attribute.
        first = "from tokengate.layers import " if wing == "layers" else f"`{wing}."
        assert f"{first}{names[0]}`" in table
        for name in names:
            assert f"{name}`" in table
            assert hasattr(module, name)


INTEGRATIONS = (ROOT / "integrations" / "README.md").read_text()


def section(title):
    """The Python of one section of the integrations' README."""
    (code,) = INTEGRATIONS.split(f"## {title}\n")[1].split("\n## ")[0].split("```python\n")[1:]
    return code.split("```")[0]


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec", "ignore:.*does not have many workers")
def test_the_lightning_example(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    plain = lightning.Trainer
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    monkeypatch.setattr(lightning, "Trainer", lambda **o: plain(**o, **quiet, accelerator="cpu"))
    monkeypatch.chdir(tmp_path)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tokengate.patch(torch.nn.Sequential(torch.nn.Linear(8, 4)), ["0"])

        def training_step(self, batch, _):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    scope = {"module": Module(), "loader": torch.utils.data.DataLoader(torch.randn(4, 5, 8))}
    exec(section("Lightning"), scope)
    assert tokengate.layers(scope["module"])["model.0"].gate.tau != 0


def test_the_open_clip_example(monkeypatch):
    open_clip = pytest.importorskip("open_clip", reason="the open_clip extra is not installed")
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 9, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}
    model = open_clip.CLIP(24, vision, text)
    before, patched = snapshot(model), []
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: model)
    unpatch = tokengate.unpatch
    monkeypatch.setattr(
        tokengate, "unpatch", lambda m: patched.extend(tokengate.layers(m)) or unpatch(m)
    )
    exec(section("open_clip"), {})
    assert len(patched) == 8
    assert snapshot(model) == before


class Processor:
    def apply_chat_template(self, turns, **options):
        ids = torch.tensor([[1, 63, 63, 63, 63, 5, 6]])
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}


def test_the_llava_example(monkeypatch, capsys):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    kind = transformers.LlavaForConditionalGeneration
    model = kind(config)
    monkeypatch.setattr(kind, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: Processor())
    scope = {}
    exec(section("LLaVA and Qwen-VL"), scope)
    assert len(tokengate.layers(model)) == 6
    printed = capsys.readouterr().out
    assert printed.startswith("image sparsity (%)")
    assert "\ntext sparsity (%)" in printed
    assert scope["rec"].report().modules


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.arange(i, i + 6)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_peft_example(monkeypatch, tmp_path):
    peft = pytest.importorskip("peft", reason="the test extra is not installed")
    monkeypatch.chdir(tmp_path)
    model = small_llama()
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(small_llama(), config)
    theirs.save_pretrained("from_peft")
    exec(section("Hugging Face PEFT"), {"model": model})
    assert len(tokengate.layers(model)) == 2
    again = peft.PeftModel.from_pretrained(small_llama(), "for_peft")
    for (name, value), (_, other) in zip(
        theirs.named_parameters(), again.named_parameters(), strict=True
    ):
        assert ("lora_" not in name) or torch.equal(value, other)


@pytest.mark.usefixtures("own_accelerate")
def test_the_trainer_example(monkeypatch, tmp_path):
    model, arguments = small_llama(), transformers.TrainingArguments
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    quiet["dataloader_pin_memory"] = False
    scope = {"texts": Texts()}
    scope["TrainingArguments"] = lambda folder, **o: arguments(tmp_path, **o, **quiet)
    # Not by putting it into transformers, which puts its own back at the next import.
    code, imported = section("Hugging Face's Trainer"), "Trainer, TrainingArguments\n"
    assert imported in code
    exec(code.replace(imported, "Trainer\n"), scope)
    logged = [x["tau_mean"] for x in scope["trainer"].state.log_history if "tau_mean" in x]
    assert logged == pytest.approx([5e-4, 1e-3], rel=0.1)


def test_the_live_logging_example(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="the test extra is not installed")
    monkeypatch.chdir(tmp_path)
    model = tokengate.patch(small_llama(), ["q_proj", "v_proj"])
    scope = {"model": model, "loader": torch.utils.data.DataLoader(Texts(), batch_size=8)}
    exec(section("Live logging"), scope)
    assert "'sparsity_q_proj': 0.0" in capsys.readouterr().out
    assert len(list((tmp_path / "outputs" / "events").iterdir())) == 1


@pytest.mark.usefixtures("own_accelerate")
def test_the_accelerate_example():
    model = tokengate.patch(small_llama(), ["q_proj", "v_proj"])
    scope = {"model": model, "loader": torch.utils.data.DataLoader(Texts(), batch_size=2)}
    exec(section("Accelerate"), scope)
    # Eight micro-batches are two steps.
    taus = [layer.gate.tau.item() for layer in tokengate.layers(model).values()]
    assert all(0 < abs(tau) <= 1.1e-3 for tau in taus)
    assert [group["lr"] for group in scope["optimizer"].param_groups] == [1e-4 * 0.998, 5e-4]
