"""The model card in an adapter's folder, and what may not be written over."""

import json

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence
from torch import nn

import tokengate
from tokengate import TokenGateError
from tokengate.gates.registry import GATES
from tokengate.methods.registry import METHODS


def trained(**options):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj", "fc1"], **{"rank": 2, "tau": 0.5} | options)
    away_from_initialisation(model)
    return model


def test_it_says_what_an_adapter_is(tmp_path):
    model = trained(method="dora", penalty=1e-4, train=["head"])
    with tokengate.record(model) as rec:
        model(torch.randn(2, 5, 8))
    tokengate.save(model, tmp_path / "mine", report=rec.report())
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: tokengate\ntags:\n- "tokengate"\n- "dora"\n---\n')
    for words in (
        "models.Net", "`dora(rank=2)` in 4 layers", "`threshold` with penalty 0.0001 in 4 layers",
        "`head.bias`, `head.weight`", f"tokengate {tokengate.__version__}",
        "tokengate.load(model, 'mine')", f"Sparsity {100 * rec.report().sparsity:.1f} %",
        rec.report().to_markdown(),
    ):  # fmt: skip
        assert words in card, words
    tokengate.save(trained(gate=False), tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "`lora(rank=2)`" in card
    assert "every position" in card
    assert "Sparsity" not in card
    with pytest.raises(TokenGateError, match="report is a str"):
        tokengate.save(model, tmp_path / "mine", report="0.5")


def test_it_says_what_is_to_be_registered_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS, "kinds", dict(METHODS.kinds))
    monkeypatch.setattr(GATES, "kinds", dict(GATES.kinds))
    tokengate.register("mine")(type("Mine", (tokengate.methods.LoRA,), {"__module__": "my_code"}))
    gate = type("Narrow", (tokengate.TokenGate,), {"__module__": "my_code"})
    tokengate.register_gate("narrow")(gate)
    for options in ({}, {"method": "mine", "gate": "narrow"}):
        tokengate.save(trained(**options), tmp_path / "mine")
        card = (tmp_path / "mine" / "README.md").read_text()
        for said in ("@tokengate.register('mine')", "@tokengate.register_gate('narrow')"):
            assert (said in card) == bool(options)
    for kinds, name in ((GATES.kinds, "narrow"), (METHODS.kinds, "mine")):
        del kinds[name]
        with one_sentence(repr(name), "import what registers it", "/mine"):
            tokengate.load(Net(), tmp_path / "mine")


def test_what_others_wrote_in_it_stays(tmp_path):
    tokengate.save(trained(), tmp_path / "mine")
    path = tmp_path / "mine" / "README.md"
    path.write_text(f"Above.\n{path.read_text()}Below.\n")
    tokengate.save(trained(method="dora"), tmp_path / "mine")
    card = path.read_text()
    assert card.startswith("Above.\n---")
    assert card.endswith("Below.\n")
    assert "`dora(rank=2)`" in card
    assert "lora(rank" not in card
    for text in (b"My own.\n", b"\xff\xfe"):
        path.write_bytes(text)
        tokengate.save(trained(), tmp_path / "mine")
        assert path.read_bytes() == text


def test_names_cannot_end_what_they_stand_in(tmp_path):
    model = nn.ModuleDict({"a`|--><b>\n# Title": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})
    tokengate.patch(model, ["fc"], train=[next(iter(model))])
    tokengate.save(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "\n# Title" not in card
    assert card.count("-->") == 2
    tokengate.save(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == card


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "pytorch_model.bin.index.json", "model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors", "model_index.json",
        "open_clip_pytorch_model.bin", "modules.json", "tf_model.h5", "weights.Q4.gguf",
    ],
)  # fmt: skip
def test_a_folder_that_holds_a_model_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"theirs")
    with one_sentence("holds a model", name):
        tokengate.save(trained(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "training_args.bin",
        "pytorch_model_fsdp.bin",
        "tokenizer.json",
        "config.json",
    ],
)
def test_what_is_no_model_is_a_neighbour(tmp_path, name):
    (tmp_path / name).write_bytes(b"theirs")
    tokengate.save(trained(), tmp_path)
    assert (tmp_path / name).read_bytes() == b"theirs"
    tokengate.load(Net(), tmp_path)


@pytest.mark.parametrize("text", ['{"peft_type": "LORA"}', "{", "[]"])
def test_an_adapter_that_is_not_ours_is_not_replaced(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"theirs")
    with one_sentence("not tokengate's"):
        tokengate.save(trained(), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"theirs"


def test_the_old_name_is_read_and_given_up(tmp_path):
    model = trained()
    tokengate.save(model, tmp_path)
    new, old = tmp_path / "tokengate_config.json", tmp_path / "adapter_config.json"
    new.rename(old)
    x, other = torch.randn(2, 5, 8), trained().double().float()
    other = tokengate.unpatch(other)
    assert not torch.equal(other(x), model(x))
    tokengate.load(other, tmp_path)
    assert torch.equal(other(x), model(x))
    text = old.read_bytes()
    tokengate.save(trained(method="dora"), tmp_path)
    assert not old.exists()
    # Killed after the weights, or before the old name was taken away, it is the newer one.
    for there in (False, True):
        old.write_bytes(text)
        if not there:
            new.unlink()
        again = Net()
        tokengate.load(again, tmp_path)
        kinds = {type(each.modification) for each in tokengate.layers(again).values()}
        assert kinds == {tokengate.methods.DoRA}
        tokengate.save(trained(method="dora"), tmp_path)
        assert json.loads(new.read_text())["base_values"] == {}
