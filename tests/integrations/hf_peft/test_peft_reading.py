"""Adapters of Hugging Face PEFT that have no equal here: one sentence, and nothing is touched."""

import copy
import warnings

import pytest
import torch
from models import Net
from peft_adapters import (
    QUIET,
    base_of,
    bert,
    config_of,
    gpt2,
    llama,
    loaded_by_peft,
    refused,
    saved_by_peft,
)
from safetensors.torch import load_file
from saved_adapters import edit, rewrite
from torch import nn

import tokengate
from tokengate import TokenGateError
from tokengate.integrations.hf_peft import import_peft

pytestmark = QUIET


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_initialisations_that_change_the_base(tmp_path, how):
    base = base_of(llama, torch.float32)
    saved_by_peft(base, tmp_path, init_lora_weights=how)
    weight = loaded_by_peft(base, tmp_path).base_model.model.model.layers[0].self_attn.q_proj
    # PEFT takes the same out of the base again, so that it is another than ours.
    assert not torch.equal(weight.base_layer.weight, base.model.layers[0].self_attn.q_proj.weight)
    refused(copy.deepcopy(base), tmp_path, f"init_lora_weights='{how}'", "base's own weights")


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("lora", {"peft_type": "VERA"}, ["peft_type='VERA'"]),
        ("lora", {"use_frobnication": 2}, ["use_frobnication=2", "not known"]),
        ("lora", {"use_frobnication": False}, ["use_frobnication=False"]),
        ("lora", {"bias": "all"}, ["bias='all'", "no equal"]),
        ("lora", {"lora_bias": True}, ["lora_bias=True"]),
        ("lora", {"use_qalora": True}, ["use_qalora"]),
        ("lora", {"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ("lora", {"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ("lora", {"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ("lora", {"use_bdlora": {"nblocks": 2}}, ["use_bdlora"]),
        ("lora", {"ensure_weight_tying": True}, ["ensure_weight_tying"]),
        ("lora", {"megatron_config": {"a": 1}}, ["megatron_config"]),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, ["'pissa_niter_4'"]),
        ("lora", {"init_lora_weights": "corda"}, ["'corda'", "base"]),
        ("lora", {"init_lora_weights": "loftq"}, ["'loftq'", "base"]),
        ("lora", {"init_lora_weights": "lora_ga"}, ["'lora_ga'", "base"]),
        ("lora", {"init_lora_weights": ["gaussian"]}, ["['gaussian']"]),
        ("lora", {"r": 5}, ["q_proj.lora_A.weight'", "[4, 32]", "[5, 32]"]),
        ("lora", {"r": 4.0}, ["adapter_config.json", "rank of", "4.0"]),
        ("lora", {"r": "4"}, ["rank of", "'4'"]),
        ("lora", {"rank_pattern": {"q_proj": 2}}, ["q_proj.lora_A.weight'", "[2, 32]"]),
        ("lora", {"rank_pattern": ["q_proj"]}, ["rank_pattern=['q_proj']"]),
        ("lora", {"rank_pattern": {"q_proj(": 2}}, ["no regular expression"]),
        ("lora", {"lora_alpha": 0}, ["alpha of", "above 0"]),
        ("lora", {"lora_alpha": "6"}, ["alpha of", "'6'"]),
        ("lora", {"alpha_pattern": {"q_proj": None}}, ["alpha of", "None"]),
        ("lora", {"lora_dropout": 1.5}, ["lora_dropout=1.5"]),
        ("lora", {"use_dora": 1}, ["use_dora=1"]),
        ("lora", {"use_dora": True}, ["lacks", "lora_magnitude_vector", "[4, 32]"]),
        ("dora", {"use_dora": False}, ["lora_magnitude_vector", "[32]", "LORA"]),
        ("lora", {"target_modules": None}, ["no target_modules"]),
        ("lora", {"target_modules": {"a": 1}}, ["target_modules={'a': 1}"]),
        ("lora", {"target_modules": ["v_proj"]}, ["q_proj", "leave out", "drop"]),
        ("lora", {"target_modules": ["q_proj", "v_proj", "o_proj"]}, ["o_proj", "no values"]),
        ("lora", {"exclude_modules": ["q_proj"]}, ["q_proj", "leave out"]),
        ("lora", {"modules_to_save": ["lm_head"]}, ["lm_head.weight", "no values"]),
        ("adalora", {"init_r": 3}, ["q_proj.lora_B'", "[32, 4]", "[32, 3]"]),
        ("adalora", {"init_r": 10**12}, ["q_proj.lora_B'", "[32, 4]", "[32, 1000000000000]"]),
        ("adalora", {"rank_pattern": {"x.lora_E": [True] * 4}}, ["x.lora_E", "no layer"]),
        ("adalora", {"peft_type": "LORA"}, ["q_proj.lora_A'", "[4, 32]"]),
        ("lora", {"peft_type": "ADALORA"}, ["q_proj.lora_A.weight'", "[4, 32]"]),
    ],
    ids=str,
)
def test_a_configuration_without_an_equal_is_refused(tmp_path, method, changes, words):
    base = base_of(llama)
    saved_by_peft(base, tmp_path, method)
    import_peft(copy.deepcopy(base), tmp_path)
    edit(tmp_path, **changes)
    refused(base, tmp_path, *words)


@pytest.mark.parametrize("mask", [[True] * 3, [1, 1, 1, 1], True])
def test_a_mask_that_is_none_is_refused(tmp_path, mask):
    base = base_of(llama)
    saved_by_peft(base, tmp_path, "adalora")
    name = "model.layers.0.self_attn.q_proj.lora_E"
    edit(tmp_path, rank_pattern={name: [True] * 4})
    import_peft(copy.deepcopy(base), tmp_path)
    edit(tmp_path, rank_pattern={name: mask})
    refused(base, tmp_path, name, "init_r=4")


PLACE = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{PLACE}lora_A.weight"), ["lacks", f"{PLACE}lora_A.weight", "[32, 4]"]),
        (lambda t: t.pop(f"{PLACE}lora_B.weight"), ["lacks", f"{PLACE}lora_B.weight", "[4, 32]"]),
        (
            lambda t: t.update({f"{PLACE}lora_B.weight": torch.ones(32, 5)}),
            [f"{PLACE}lora_B.weight", "[32, 5]", "[32, 4]"],
        ),
        (
            lambda t: t.update({f"{PLACE}lora_A.weight": torch.ones(4, 33)}),
            ["layers.0.self_attn.q_proj", "(33, 32)", "(32, 32)"],
        ),
        (
            lambda t: t.update({f"{PLACE}lora_A.weight": torch.tensor(1.0)}),
            [f"{PLACE}lora_A.weight", "[]"],
        ),
        (lambda t: t[f"{PLACE}lora_A.weight"].fill_(float("nan")), ["lora_A.weight", "not finite"]),
        (
            lambda t: t.update({f"{PLACE}lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}),
            [f"{PLACE}lora_A.weight", "I32"],
        ),
        (lambda t: t.update({f"{PLACE}lora_B.bias": torch.ones(32)}), ["lora_B.bias", "[32]"]),
        (lambda t: t.update({f"{PLACE}weight": torch.ones(32, 32)}), ["q_proj.weight", "[32, 32]"]),
        (lambda t: t.update({"q_proj.lora_A.weight": torch.ones(4, 32)}), ["'q_proj.lora_A"]),
        (
            lambda t: t.update({f"{PLACE[:17]}model.embed_tokens.lora_embedding_A": torch.ones(4)}),
            ["lora_embedding_A", "[4]"],
        ),
        (dict.clear, ["no adapted layer"]),
    ],
)
def test_other_tensors_are_refused(tmp_path, change, words):
    base = base_of(llama)
    saved_by_peft(base, tmp_path)
    import_peft(copy.deepcopy(base), tmp_path)
    rewrite(tmp_path, change)
    refused(base, tmp_path, *words)


def test_embeddings_and_missing_layers_are_refused_or_skipped(tmp_path):
    base = base_of(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT saves the embedding itself, too
        saved_by_peft(base, tmp_path / "a", targets=["embed_tokens", "q_proj"])
    refused(copy.deepcopy(base), tmp_path / "a", "embed_tokens")
    saved_by_peft(base, tmp_path / "b")
    smaller = base_of(llama)
    del smaller.model.layers[1]
    text = refused(smaller, tmp_path / "b", "model.layers.1.self_attn.q_proj", "not in the model")
    assert "strict=False" in text
    skipped = import_peft(smaller, tmp_path / "b", strict=False)
    assert sorted(skipped) == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]
    assert len(tokengate.layers(smaller)) == 2
    edit(tmp_path / "b", target_modules=["q_proj", "v_proj", "o_proj"])
    skipped = import_peft(copy.deepcopy(base), tmp_path / "b", strict=False)
    assert sorted(skipped) == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]


def test_values_of_an_adapted_head_s_base_are_refused_with_what_leaves_them_out(tmp_path):
    """PEFT saves them by itself where an output head is a target."""
    peft = pytest.importorskip("peft", reason="the test extra is not installed")
    base = base_of(llama, torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.base_model.model.lm_head.lora_B["default"].weight.data.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    refused(copy.deepcopy(base), tmp_path, "lm_head.base_layer", "save_embedding_layers=False")
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours, ids = copy.deepcopy(base).eval(), torch.arange(1, 9)[None]
    import_peft(ours, tmp_path)
    assert not torch.allclose(ours(ids).logits, base.eval()(ids).logits)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_heads_that_do_not_fit_are_refused(tmp_path):
    base = base_of(bert)
    saved_by_peft(base, tmp_path, targets=["query"], task_type="SEQ_CLS")
    assert config_of(tmp_path)["modules_to_save"] == ["classifier", "score"]
    import_peft(copy.deepcopy(base), tmp_path)
    other = base_of(bert)
    other.classifier = nn.Linear(32, 5).double()
    refused(other, tmp_path, "classifier.", "[3", "[5")
    skipped = import_peft(other, tmp_path, strict=False)
    assert sorted(skipped) == ["classifier.bias", "classifier.weight"]
    rewrite(tmp_path, lambda t: t.pop("base_model.model.classifier.bias"))
    refused(copy.deepcopy(base), tmp_path, "classifier.bias", "no values")
    edit(tmp_path, modules_to_save=None)
    refused(copy.deepcopy(base), tmp_path, "classifier.weight", "[3, 32]", "modules_to_save")


def test_a_target_that_is_saved_whole_is_a_head(tmp_path):
    base = Net()
    saved_by_peft(base, tmp_path, targets=["fc1", "head"], modules_to_save=["head"])
    import_peft(base, tmp_path)
    assert list(tokengate.layers(base)) == ["blocks.0.fc1", "blocks.1.fc1"]
    assert base.head.weight.requires_grad


def test_tied_heads_and_buffers_are_refused(tmp_path):
    base = base_of(gpt2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own of tied weights
        saved_by_peft(base, tmp_path / "a", targets=["c_attn"], modules_to_save=["lm_head"])
    refused(base, tmp_path / "a", "lm_head.weight", "tied")
    plain = Net()
    plain.norm = nn.BatchNorm1d(3)
    saved_by_peft(plain, tmp_path / "b", targets=["fc1"], modules_to_save=["blocks.0.norm"])
    import_peft(copy.deepcopy(plain), tmp_path / "b")
    plain.blocks[0].norm = nn.BatchNorm1d(8)
    saved_by_peft(plain, tmp_path / "b", targets=["fc1"], modules_to_save=["blocks.0.norm"])
    refused(plain, tmp_path / "b", "blocks.0.norm.", "is a buffer")


def test_folders_that_are_none_of_pefts_are_refused(tmp_path):
    base = base_of(llama)
    refused(base, tmp_path / "nowhere", "does not exist")
    saved_by_peft(base, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    refused(base, tmp_path, "adapter_model.bin", "pickle", "safetensors")
    (tmp_path / "adapter_model.bin").unlink()
    refused(base, tmp_path, "adapter_model.safetensors", "does not exist")
    saved_by_peft(base, tmp_path / "several" / "maths")
    refused(
        base, tmp_path / "several", "does not exist", f"e.g. '{tmp_path / 'several' / 'maths'}'"
    )
    weights.write_bytes(b"no tensors")
    refused(base, tmp_path, "no safetensors file")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(base, tmp_path, "JSON")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(base, tmp_path, "no peft_type")
    patched = tokengate.patch(base_of(llama), ["q_proj"])
    tokengate.save(patched, tmp_path / "own")
    refused(base, tmp_path / "own", "tokengate.load reads")
    saved_by_peft(base, tmp_path / "b")
    refused(patched, tmp_path / "b", "patched already")
    refused(base, tmp_path / "b", "tau='0'", tau="0")
    refused(base, tmp_path / "b", "penalty=-1", penalty=-1)
    refused(base, tmp_path / "b", "gate=1", gate=1)
    saved_by_peft(base_of(llama, torch.float64), tmp_path / "c")
    refused(base_of(llama, torch.float32), tmp_path / "c", "float64", "float32", "cannot hold")
    with pytest.raises(TokenGateError, match="import_peft was given a int"):
        import_peft(3, tmp_path / "b")
