"""What Hugging Face PEFT has no equal for is not written for it: one sentence, and no file."""

import copy
import os

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence
from peft_adapters import (
    QUIET,
    base_of,
    bert,
    close,
    config_of,
    gpt2,
    llama,
    loaded_by_peft,
    logits,
    refused,
    saved_by_peft,
)
from torch import nn

import tokengate
from tokengate import Slices, TokenGateError
from tokengate.integrations.hf_peft import export_peft, import_peft, writing

pytestmark = QUIET


def not_exported(model, folder, *words, **options):
    before = set(folder.iterdir()) if folder.exists() else None
    with one_sentence(*words) as text:
        export_peft(model, folder, **options)
    assert (set(folder.iterdir()) if folder.exists() else None) == before
    return text[0]


def test_a_gated_adapter_is_exported_only_when_asked(tmp_path):
    base = base_of(llama)
    ours = tokengate.patch(copy.deepcopy(base), ["q_proj"], rank=2)
    away_from_initialisation(ours)
    tokengate.layers(ours)["model.layers.1.self_attn.q_proj"].gate.tau.data.fill_(5.0)
    text = not_exported(ours, tmp_path / "a", "tau above 0 in 1 of 2 layers", "tau=5", "layers.1")
    assert "ungated=True" in text
    export_peft(ours, tmp_path / "a", ungated=True)
    theirs = logits(loaded_by_peft(base, tmp_path / "a"))
    assert (theirs - logits(ours)).abs().max() > 1e-2
    for layer in tokengate.layers(ours).values():
        layer.gate.tau.data.zero_()
    close(theirs, logits(ours))


def test_what_peft_has_no_equal_for_is_not_exported(tmp_path):
    folder = tmp_path / "a"
    patch = tokengate.patch
    not_exported(Net(), folder, "without a patched layer")
    not_exported(patch(Net(), ["fc1"], "adapter"), folder, "'adapter'", "no equal", "fc1")
    slices = {"fc1": Slices(a=8, b=8)}
    sliced = patch(Net(), ["fc1.a"], slices=slices)
    not_exported(sliced, folder, "a slice of a fused layer", "'blocks.0.fc1.a'")
    not_exported(patch(nn.Linear(4, 4), lambda n, m: True), folder, "the whole model")

    class Own(tokengate.methods.LoRA):
        pass

    not_exported(patch(Net(), ["fc1"], Own), folder, "'Own'")
    mixed = patch(patch(Net(), ["fc1"], "lora"), ["q_proj"], "dora")
    not_exported(mixed, folder, "'dora'", "'lora'", "one method")
    dropouts = patch(Net(), ["fc1"], dropout={"blocks.0.*": 0.1, "*": 0.2})
    not_exported(dropouts, folder, "dropout=0.1", "0.2")
    with torch.device("meta"):
        meta = patch(Net(), ["fc1"])
    not_exported(meta, folder, "export_peft found no values", "meta device")
    model = patch(Net(), ["fc1"])
    not_exported(model, folder, "task_type='chat'", "SEQ_CLS", task_type="chat")
    not_exported(model, folder, "task_type=['SEQ_CLS']", task_type=["SEQ_CLS"])
    not_exported(model, folder, "base_model_name=3", base_model_name=3)
    not_exported(model, folder, "ungated=3", ungated=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenGateError, match="is a file"):
        export_peft(model, tmp_path / "file")
    tokengate.save(model, tmp_path / "own")
    not_exported(model, tmp_path / "own", "holds an adapter that is not PEFT's")
    export_peft(model, folder)
    export_peft(model, folder, base_model_name=tmp_path)  # PEFT's own is replaced
    assert config_of(folder)["base_model_name_or_path"] == str(tmp_path)


def test_weights_are_never_beside_another_adapters_configuration(tmp_path, monkeypatch):
    """Of other scales, with which PEFT would load them without a word."""
    put = os.replace

    def killed(source, target):
        if target.name == "adapter_config.json":
            raise KeyboardInterrupt
        put(source, target)

    export_peft(tokengate.patch(Net(), ["fc1"], rank=2, alpha=1), tmp_path)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_peft(tokengate.patch(Net(), ["fc1"], rank=2, alpha=7), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]
    refused(Net(), tmp_path, "adapter_config.json", "does not exist")


def test_a_folder_that_cannot_be_written_keeps_its_adapter(tmp_path, monkeypatch):
    model = away_from_initialisation(tokengate.patch(Net(), ["fc1"], rank=2))
    export_peft(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(writing, "save_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        export_peft(tokengate.patch(Net(), ["fc1"]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_heads_that_are_no_whole_modules_are_not_exported(tmp_path):
    folder = tmp_path / "a"
    patch = tokengate.patch
    model = patch(Net(), ["fc1"], train=["head.bias"])
    not_exported(model, folder, "'head.bias'", "'weight' is not trained")
    direct = Net()
    direct.scale = nn.Parameter(torch.ones(3))
    not_exported(patch(direct, ["fc1"], train=["scale"]), folder, "'scale'", "the model itself")
    tied = base_of(gpt2)
    not_exported(patch(tied, ["c_attn"], train=["wte"]), folder, "tied")
    named = Net()
    named.lora_head = nn.Linear(3, 3)
    not_exported(patch(named, ["fc1"], train=["lora_head"]), folder, "'lora_' in its name")
    # PEFT matches modules to save by the end of their names.
    twins = Net()
    twins.other_head = nn.Linear(3, 3)
    not_exported(patch(twins, ["fc1"], train=["head"]), folder, "'other_head'", "too with")
    inside = Net()
    inside.part = nn.Module()
    inside.part.head = nn.Linear(8, 8)
    inside.part.head.fc1 = nn.Linear(8, 8)
    text = not_exported(patch(inside, ["fc1"], train=["head.weight", "head.bias"]), folder)
    assert "'fc1.weight' is not trained" in text
    inside = Net()
    inside.head = nn.Sequential(nn.Linear(8, 3))
    model = patch(inside, ["fc1"], train=["head"])
    export_peft(model, folder)
    assert config_of(folder)["modules_to_save"] == ["head.0"]
    bert_model = patch(base_of(bert), ["query"])
    not_exported(bert_model, tmp_path / "b", "'classifier'", "task_type", task_type="SEQ_CLS")


def test_a_layer_that_peft_takes_for_a_part_of_a_head_is_not_exported(tmp_path):
    model = Net()
    model.out = nn.Module()
    model.out.head = nn.Module()
    model.out.head.fc = nn.Linear(3, 3)
    tokengate.patch(model, ["out.head.fc"], train=["head.weight", "head.bias"])
    not_exported(model, tmp_path / "a", "'out.head'", "modules_to_save=['head']")
    # A dot in the head's name matches any character, too.
    model = Net()
    model.head = nn.Sequential(nn.Linear(8, 3))
    model.head_0 = nn.Sequential(nn.Linear(3, 3))
    tokengate.patch(model, ["head_0.0"], train=["head"])
    not_exported(model, tmp_path / "a", "the layer 'head_0.0'", "modules_to_save=['head.0']")


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Module(), nn.Module()
        self.a.q = self.b.q = nn.Linear(4, 4)
        self.a.v = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.a.q(x), self.b.q(x), self.a.v(x)], -1)


def test_a_layer_in_two_places_is_neither_exported_nor_imported(tmp_path):
    x = torch.randn(3, 4)
    theirs = saved_by_peft(Twice(), tmp_path, targets=["q", "v"])
    apart = (theirs(x) - theirs.base_model.model.b.q(x).repeat(1, 3)).abs().amax(0)
    assert apart[:4].min() > 0  # adapted
    assert apart[4:8].max() == 0  # and not adapted
    refused(Twice(), tmp_path, "'a.q' is held by several modules")
    model = Twice()
    assert list(import_peft(model, tmp_path, strict=False)) == ["a.q"]
    assert list(tokengate.layers(model)) == ["a.v"]
    not_exported(tokengate.patch(Twice(), ["q"]), tmp_path / "b", "'a.q'", "several modules")
    export_peft(tokengate.patch(Twice(), ["v"]), tmp_path / "b")


def test_pruned_rows_in_a_layer_called_default_are_not_exported(tmp_path):
    model = nn.Module()
    model.default = nn.Linear(4, 4)
    tokengate.patch(model, ["default"], "adalora", rank=2)
    away_from_initialisation(model)
    export_peft(model, tmp_path / "a")
    model.default.modification.E.data[0] = 0
    not_exported(model, tmp_path / "b", "'default.lora_E'", "pruned")
