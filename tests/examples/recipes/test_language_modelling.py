"""The language modelling recipe: what is held out, what is measured, and each run done once."""

import importlib
import json
import lzma
import math
import sys

import pytest
import torch
from models import away_from_initialisation, small_llama
from places import RECIPES, SHARED
from transformers import TrainingArguments

import tokengate
from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer

TEXT = SHARED / "text" / "tinyshakespeare.txt.xz"
real = pytest.mark.skipif(
    not TEXT.exists(), reason="the real texts lie beside the project, not in it"
)
SEED_0 = ["lora-off-0", "lora-on-0"]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    yield importlib.import_module("language_modelling")
    for name in ("language_modelling", "recipe", "recipe_results", "forgetting"):
        del sys.modules[name]


def test_a_text_is_read_as_it_is(recipe, tmp_path):
    text = "a \r\n é\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    assert recipe.read(tmp_path / "a.txt") == recipe.read(tmp_path / "a.txt.xz") == text


def test_the_text_is_cut_by_position(recipe):
    assert recipe.parts("0123456789", validation=False) == ("01234567", "9")
    assert recipe.parts("0123456789", validation=True) == ("01234567", "8")


class Letters:
    """Every character of a text is a token."""

    bos_token_id, eos_token_id = 0, 1

    def __call__(self, text, **options):
        assert options == {"add_special_tokens": False, "verbose": False}
        return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})


def test_a_block_is_the_start_and_255_tokens(recipe):
    text = "a" * 255 + "b" * 255 + "c"
    found = [block["input_ids"].tolist() for block in recipe.blocks(text, Letters())]
    assert found == [[0] + [97] * 255, [0] + [98] * 255, [0, 99]]
    without = Letters()
    without.bos_token_id = None
    assert recipe.blocks("c", without)[0]["labels"].tolist() == [1, 99]


class Favours(torch.nn.Module):
    """Gives "c" the probability 1/4, and the other 127 tokens 3/508 each."""

    device = "cpu"

    def forward(self, input_ids):
        logits = torch.full((*input_ids.shape, 128), math.log(3 / 508))
        logits[..., 99] = math.log(1 / 4)
        return type("Output", (), {"logits": logits})


def test_every_token_is_measured_once_and_every_byte_counts(recipe):
    # Three full blocks in batches of two, and one of two tokens, of which "é" is two bytes.
    text = "a" * 255 * 2 + "c" * 255 + "cé"
    blocks = recipe.blocks(text.replace("é", "e"), Letters())
    found = recipe.measure(Favours(), blocks, text, 2)
    bits = 256 * 2 + 511 * math.log2(508 / 3)
    assert found["bits per byte"] == pytest.approx(bits / 768)
    assert found["perplexity"] == pytest.approx(2 ** (bits / 767))


def call(recipe, monkeypatch, folder, *more):
    arguments = ["language_modelling.py", "--smoke", "--output", str(folder), *map(str, more)]
    monkeypatch.setattr(sys, "argv", arguments)
    recipe.main()


def test_smoke_runs_every_combination_once(recipe, monkeypatch, tmp_path, capsys):
    call(recipe, monkeypatch, tmp_path)
    found = [json.loads((tmp_path / run / "results.json").read_text()) for run in SEED_0]
    for run in found:
        assert run["scores"] == {recipe.NAME: run["after"]["bits per byte"]}
        assert 0 < run["before"]["bits per byte"] < 8
        assert run["after"] != run["before"]
    assert found[0]["before"] == found[1]["before"]
    assert found[0]["sparsity"] == {recipe.NAME: 0}
    for run in found:
        assert run["drift"][recipe.NAME] > run["drift of 0.8 M(x)"][recipe.NAME] > 0
    table = (tmp_path / "table.md").read_text()
    assert f"| LoRA | {found[0]['after']['bits per byte']:.3f} |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 5000
    monkeypatch.setattr(recipe, "perform", lambda run: pytest.fail("a run was repeated"))
    call(recipe, monkeypatch, tmp_path)


@real
@pytest.mark.filterwarnings("ignore:SparsitySchedule was to close")
def test_smoke_runs_on_a_real_text(recipe, monkeypatch, tmp_path):
    call(recipe, monkeypatch, tmp_path, "--data", TEXT, "--method", "adalora", "--gate", "0.6")
    found = json.loads((tmp_path / "adalora-0.6-0" / "results.json").read_text())
    assert found["after"] != found["before"]


@real
def test_a_converted_checkpoint_learns_a_text(recipe, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(RECIPES.parent)
    convert = importlib.import_module("convert_llama2c")
    weights, model = TEXT.parents[1] / "weights", tmp_path / "model"
    line = ["convert_llama2c.py", weights / "stories260K.bin", weights / "tok512.bin", model]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    convert.main()
    text = recipe.read(TEXT)[:60_000]
    (tmp_path / "text.txt").write_text(text)
    line = ["language_modelling.py", "--model", model, "--data", tmp_path / "text.txt"]
    line += ["--gate", 0.5, "--rows", 32, "--epochs", 1, "--lr", 3e-2, "--batch-size", 8]
    monkeypatch.setattr(sys, "argv", [*map(str, line), "--output", str(tmp_path)])
    recipe.main()
    found = json.loads((tmp_path / "lora-0.5-0" / "results.json").read_text())
    # One that knows nothing finds each of its 512 tokens as likely; this one knows some English.
    assert found["after"]["perplexity"] < found["before"]["perplexity"] < 400
    assert len(found["report"]["modules"]) == 5 * 5
    assert 0 < found["report"]["sparsity"] < 1


def test_what_cannot_be_trained_on_is_said(recipe, monkeypatch, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a b c d e f g h i j\n")
    with pytest.raises(SystemExit, match=r"lora-off-0: .*short.txt has less than 256 tokens"):
        call(recipe, monkeypatch, tmp_path, "--data", tmp_path / "short.txt")
    monkeypatch.chdir(tmp_path)
    for more, words in (
        ([], "pass --data"),
        (["--data", "short.txt"], "there is no outputs/stories260K: make it with convert_llama2c"),
    ):
        monkeypatch.setattr(sys, "argv", ["language_modelling.py", *more])
        with pytest.raises(SystemExit):
            recipe.main()
        assert words in capsys.readouterr().err


def test_scores_have_the_decimals_that_are_asked_for(recipe):
    results = recipe.recipe.recipe_results
    scores = {("lora", "off"): {"t": {0: 2.0, 1: 2.1}}, ("lora", "on"): {"t": {0: 2.0125, 1: 2.1}}}
    sparsity = {("lora", "off"): {"t": {0: 0.0, 1: 0.0}}, ("lora", "on"): {"t": {0: 60.0, 1: 61.0}}}
    rows = results.table(scores, {"sparsity": sparsity}, 3).splitlines()[2:]
    assert rows == [
        "| LoRA | 2.050 (0.071) |",
        "| LoRA_S | 2.056 (0.062) |",
        "| sparsity (%) | 60.5 (0.7) |",
        "| LoRA_S - LoRA | +0.006 (0.009) |",
    ]
    assert "| LoRA | 2.0 (0.1) |" in results.table(scores, {"sparsity": sparsity})


def test_replay_adds_beta_kl_on_texts_of_the_base(recipe, tmp_path):
    forgetting = importlib.import_module("forgetting")
    model = small_llama()
    texts = forgetting.own_texts(model, 1, 5, 12, seed=3)
    assert texts.shape == (5, 12)
    assert (texts[:, 0] == 1).all()
    assert torch.equal(texts, forgetting.own_texts(model, 1, 5, 12, seed=3))
    assert not torch.equal(texts, forgetting.own_texts(model, 1, 5, 12, seed=4))
    tokengate.patch(model, ["q_proj"], gate=False)
    away_from_initialisation(model)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = forgetting.replayed(0.5, texts, seed=0)(
        model, arguments, callbacks=[TokenGateCallback()]
    )
    ids = torch.arange(2, 14)[None]
    inputs = {"input_ids": ids, "labels": ids}
    drawn = texts[torch.randint(5, (3,), generator=torch.Generator().manual_seed(0))]
    plain = TokenGateTrainer.compute_loss(trainer, model, inputs)
    with torch.no_grad():
        now = model(drawn).logits.log_softmax(-1)
        with tokengate.disabled(model):
            base = model(drawn).logits.log_softmax(-1)
    kl = (base.exp() * (base - now)).sum(-1).mean()
    assert kl > 0.01
    model.train()
    assert trainer.compute_loss(model, inputs).item() == pytest.approx(
        (plain + 0.5 * kl).item(), rel=1e-4
    )
    assert trainer.compute_loss(model.eval(), inputs).item() == plain.item()  # what is evaluated
