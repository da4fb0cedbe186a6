"""tokengate.export_changes: M(x) and S by hand, in files that safetensors reads."""

import pytest
import torch
from mixtures import Experts, Mixture
from models import Net, away_from_initialisation, one_sentence, small_llama, snapshot
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import tokengate


def patched(**options):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj", "v_proj"], rank=2, tau=1.0, **options)
    return away_from_initialisation(model)


@pytest.mark.parametrize("method", ["lora", "dora", "adapter"])
def test_m_and_s_are_what_the_layers_added(tmp_path, method):
    model = patched(method=method)
    before = snapshot(model)
    inputs, outputs = {}, {}
    for name, layer in tokengate.layers(model).items():

        def keep(_, given, out, name=name):
            inputs[name], outputs[name] = given[0], out

        layer.register_forward_hook(keep)
    batches = [torch.randn(2, 5, 8), torch.randn(3, 4, 8)]
    files = tokengate.export_changes(model, batches, tmp_path / "made")
    assert [file.name for file in files] == ["batch-00000.safetensors", "batch-00001.safetensors"]
    assert sorted(files) == sorted((tmp_path / "made").iterdir())
    found = load_file(files[1])
    assert set(found) == {f"{n}{end}" for n in tokengate.layers(model) for end in ("", ".open")}
    opened = 0
    for name, layer in tokengate.layers(model).items():
        m, s = found[name], found[f"{name}.open"]
        assert (m.shape, s.shape, s.dtype) == ((3, 4, 8), (3, 4), torch.bool)
        base = nn.functional.linear(inputs[name], layer.weight, layer.bias)
        assert m.norm() > 0.1
        torch.testing.assert_close(outputs[name], base + s.unsqueeze(-1) * m)
        opened += s.float().mean().item() / 4
    assert 0.05 < opened < 0.95
    after = snapshot(model)
    assert after["values"] == before["values"]
    assert after["modules"] == before["modules"]


@pytest.mark.parametrize("wanted", ["q_proj", ["q_proj"], ["*.q_proj"], "blocks.*.q_proj"])
def test_modules_are_chosen_as_targets_are(tmp_path, wanted):
    (file,) = tokengate.export_changes(patched(), [torch.randn(1, 2, 8)], tmp_path, modules=wanted)
    names = {"blocks.0.q_proj", "blocks.1.q_proj"}
    assert set(load_file(file)) == names | {f"{name}.open" for name in names}


def test_tokens_are_beside_it_and_numbers_as_small_as_asked(tmp_path):
    model = away_from_initialisation(tokengate.patch(small_llama(), ["q_proj"], rank=2, gate=False))
    ids = torch.randint(1, 64, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    name = "model.layers.1.self_attn.q_proj"
    (file,) = tokengate.export_changes(
        model, [batch], tmp_path, modules=[name], dtype=torch.bfloat16
    )
    with safe_open(file, "pt") as read:
        assert read.metadata() == {"format": "pt"}
    found = load_file(file)
    assert set(found) == {name, f"{name}.open", "input_ids", "attention_mask"}
    assert torch.equal(found["input_ids"], ids)
    assert found[name].dtype == torch.bfloat16
    assert found[f"{name}.open"].all()  # without a gate it is added everywhere
    (whole,) = tokengate.export_changes(model, [batch], tmp_path, modules=[name])
    torch.testing.assert_close(load_file(whole)[name].bfloat16(), found[name])
    (by_position,) = tokengate.export_changes(model, [tuple(batch.values())], tmp_path)
    assert {"input_ids", "attention_mask"} < set(load_file(by_position))


def test_a_layer_that_is_called_twice_and_slices(tmp_path):
    twice = nn.Sequential(layer := nn.Linear(4, 4), nn.ReLU(), layer)
    model = away_from_initialisation(tokengate.patch(twice, ["0"], rank=1))
    (file,) = tokengate.export_changes(model, [torch.randn(3, 4)], tmp_path)
    found = load_file(file)
    assert set(found) == {"0", "0.open", "0#1", "0#1.open"}
    assert not torch.equal(found["0"], found["0#1"])


def test_more_than_the_limit_is_refused_and_nothing_is_left(tmp_path):
    model = patched()
    x = torch.randn(2, 5, 8)
    # 10 positions x 4 modules x (8 numbers of 4 bytes, and S).
    need = 10 * 4 * (8 * 4 + 1)
    words = ("limit=1.3 KiB", "4 modules", "128 B for each position", "larger limit")
    with one_sentence(*words):
        tokengate.export_changes(model, [x], tmp_path, limit=need - 1)
    assert list(tmp_path.iterdir()) == []
    assert len(tokengate.export_changes(model, [x], tmp_path, limit=need)) == 1
    with one_sentence("limit"):
        tokengate.export_changes(model, [x, x], tmp_path / "two", limit=2 * need - 1)
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["batch-00000.safetensors"]


def test_refusals(tmp_path):
    model, x = patched(), torch.randn(2, 5, 8)
    with one_sentence("without a patched layer"):
        tokengate.export_changes(Net(), [x], tmp_path)
    with one_sentence("'k_proj'", "tokengate.layers(model)"):
        tokengate.export_changes(model, [x], tmp_path, modules=["q_proj", "k_proj"])
    with one_sentence("no module"):
        tokengate.export_changes(model, [x], tmp_path, modules=[])
    with one_sentence("torch.int64", "torch.float16"):
        tokengate.export_changes(model, [x], tmp_path, dtype=torch.int64)
    with one_sentence("several batches"):
        tokengate.export_changes(model, x, tmp_path)
    with one_sentence("no batch"):
        tokengate.export_changes(model, [], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_come_first_also_where_the_model_has_them_second(tmp_path):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False).eval()
    model = away_from_initialisation(tokengate.patch(encoder, ["linear1"], rank=2))
    x = torch.randn(4, 4, 8)  # as many samples as places, which no shape tells apart
    found = load_file(tokengate.export_changes(model, [x], tmp_path)[0])["linear1"]
    (alone,) = tokengate.export_changes(model, [x[:, 1:2]], tmp_path / "alone")
    torch.testing.assert_close(found[1:2], load_file(alone)["linear1"])


def test_experts_are_refused(tmp_path):
    """Their files had no M(x) in them, without a word."""
    model = Mixture(Experts(4, 6, 8, way="grouped"))
    tokengate.patch(model, ["experts.w"], rank=2, experts={"experts.w": "eoi"})
    batch = (torch.randn(5, 8), torch.arange(10).view(5, 2) % 4)
    with one_sentence("'experts.w', which are experts", "modules= without"):
        tokengate.export_changes(model, [batch], tmp_path)
    assert not list(tmp_path.iterdir())
