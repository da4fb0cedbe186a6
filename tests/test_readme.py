"""The README's Python runs as printed, on a tiny model in place of the large one."""

import importlib
import re
import socket

import pytest
import torch
from models import away_from_initialisation, snapshot
from places import ROOT

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

README = (ROOT / "README.md").read_text()


CODE = [part.split("```")[0] for part in README.split("```python\n")[1:]]


class Tokenizer:
    def __call__(self, text, return_tensors):
        return {"input_ids": torch.arange(3, 3 + len(text.split()))[None]}


def small_llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_the_language_model_example(monkeypatch, capsys):
    code = CODE[0]
    assert len([line for line in code.splitlines() if line]) <= 15

    def model(name, dtype):
        return small_llama().to(dtype)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    scope = {}
    exec(code, scope)
    assert len(tokengate.layers(scope["model"])) == 4
    assert "sparsity (%)" in capsys.readouterr().out


def test_the_adalora_example(capsys):
    assert len(CODE) == 7
    scope = {}
    exec(CODE[1], scope)
    assert sum(scope["allocator"].ranks.values()) == 8
    assert str(scope["allocator"].ranks) in capsys.readouterr().out


def test_the_example_of_regions():
    scope = {}
    exec(CODE[2], scope)
    model, x, suffix = scope["model"], scope["x"], scope["suffix"]
    away_from_initialisation(model)
    with tokengate.disabled(model):
        base = model(x)
    with tokengate.restrict(model, suffix):
        found = model(x)
    assert torch.equal(found[~suffix], base[~suffix])
    assert not torch.equal(found[suffix], base[suffix])


def test_the_example_that_keeps_an_adapter(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(CODE[3], scope)
    assert (tmp_path / "outputs" / "adapter" / "tokengate_config.json").exists()
    assert "1 kept" in capsys.readouterr().out
    assert list(tokengate.layers(scope["model"])) == ["0"]


def test_the_example_of_a_page(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer()
    tokenizer.convert_ids_to_tokens = lambda ids: [f"token {number}" for number in ids.tolist()]
    model = tokengate.patch(small_llama(), ["q_proj"])
    scope = {"tokengate": tokengate, "model": model, "tokenizer": tokenizer}
    exec(CODE[4], {**scope, "batch": tokenizer("a b c", return_tensors="pt")})
    page = (tmp_path / "outputs" / "report.html").read_text()
    assert '"tokens":["token 3","token 4","token 5"]' in page


def test_the_example_that_is_seen(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="the viz extra is not installed")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(CODE[5], scope)
    assert {path.name for path in tmp_path.iterdir()} == {"sparsity.png", "trajectories.png"}
    assert scope["history"].steps == list(range(0, 100, 10))
    assert scope["history"].sparsity[-1] > 0


def test_the_example_of_several_processes(monkeypatch):
    """On one process, which sees whether it runs; tests/training/test_distributed.py has two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    joining = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in joining.items():
        monkeypatch.setenv(name, value)
    ids = torch.arange(3, 9)[None]
    scope = {"model": small_llama(), "batch": {"input_ids": ids, "labels": ids}}
    try:
        exec(CODE[6], scope)
    finally:
        torch.distributed.destroy_process_group()
    assert {m.positions for m in scope["report"].modules.values()} == {6}
    for layer in tokengate.layers(scope["model"]).values():
        assert layer.gate.tau.full_tensor().item() == pytest.approx(4e-5, rel=1e-3)


def test_the_table_of_methods():
    from tokengate.gates.registry import options_of
    from tokengate.methods import registry

    text = README.split("## The methods")[1].split("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith('| `"')]
    options = {row[1].strip(' `"'): row[3] for row in rows}
    assert options["dora"].strip() == 'as `"lora"`'
    assert set(options) == {"lora", "dora", "adalora", "adapter"}
    for method in ("lora", "adalora", "adapter"):
        named = re.findall(r"`(\w+)`", options[method])
        assert named == list(options_of(registry.METHODS.find(method)))


def test_the_api_table_names_what_there_is():
    table = README.split("## The API")[1].split("##")[0]
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
