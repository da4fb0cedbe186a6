"""PEFT's adapters are not patched, and none is put around what is patched."""

from collections import OrderedDict

import pytest
import torch

import tokengate
from tokengate import TokenGateError
from tokengate.errors import FrozenAdapterWarning

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")

# PEFT's own use of what transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


LORA = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ELSEWHERE = peft.LoraConfig(target_modules=["up_proj"])
OTHERS = {
    "lora": LORA,
    "elsewhere": ELSEWHERE,
    "ia3": peft.IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


def state(model):
    named = model.named_parameters()
    return {name: (id(parameter), parameter.requires_grad) for name, parameter in named}


@pytest.mark.parametrize("other", OTHERS)
def test_peft_is_not_put_around_what_is_patched(other):
    model = tokengate.patch(llama(), ["q_proj", "v_proj"])
    before = state(model)
    with pytest.raises(TokenGateError, match=r"q_proj' tokengate has patched.*leave PEFT out"):
        peft.get_peft_model(model, OTHERS[other])
    assert state(model) == before
    tokengate.unpatch(model)
    assert isinstance(peft.get_peft_model(model, OTHERS[other]), peft.PeftModel)


def test_nor_by_other_ways(tmp_path):
    peft.get_peft_model(llama(), LORA).save_pretrained(tmp_path)
    for put in (
        lambda model: peft.PeftModel.from_pretrained(model, tmp_path),
        lambda model: peft.get_peft_model(torch.nn.Sequential(model), ELSEWHERE),
        lambda model: peft.inject_adapter_in_model(LORA, model),
    ):
        model = tokengate.patch(llama(), ["q_proj"])
        with pytest.raises(TokenGateError, match="leave PEFT out"):
            put(model)


def test_it_would_freeze_everything(monkeypatch):
    model = tokengate.patch(llama(), ["q_proj", "v_proj"])
    monkeypatch.setattr(torch.nn.modules.module, "_global_module_registration_hooks", OrderedDict())
    peft.get_peft_model(model, ELSEWHERE)
    layers = tokengate.layers(model).values()
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())


ADAPTED = r"which is PEFT's: call model.merge_and_unload\(\)"


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], ["lora_A"], ["lora_B.default"], ["*.default"]]
)
def test_what_peft_put_there_is_not_patched(targets):
    model = peft.get_peft_model(llama(), LORA)
    before = state(model)
    with pytest.raises(TokenGateError, match=ADAPTED):
        tokengate.patch(model, targets)
    assert state(model) == before
    assert not tokengate.layers(model)
    merged = model.merge_and_unload()
    assert len(tokengate.layers(tokengate.patch(merged, "all-linear"))) == 14


def test_what_is_beneath_and_beside_it_can_be():
    model = peft.get_peft_model(llama(), LORA)
    with pytest.warns(FrozenAdapterWarning):
        tokengate.patch(model, ["up_proj", "q_proj.base_layer"])
    tokengate.patch(model, ["k_proj"])  # which freezes nothing, and says nothing
    assert len(tokengate.layers(model)) == 6
    model.add_adapter("second", LORA)
    model.set_adapter("second")
    tokengate.verify(model, torch.ones(1, 4, dtype=torch.long))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("other", OTHERS)
def test_who_freezes_an_adapter_in_training_is_told(other, tmp_path):
    model = peft.get_peft_model(llama(), OTHERS[other])
    before = trained(model)
    with pytest.warns(FrozenAdapterWarning, match="which PEFT had in training") as caught:
        tokengate.patch(model, ["k_proj"])
    assert min(before).removeprefix("base_model.") in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    assert not trained(model) & before
    tokengate.save(model, tmp_path)
    assert trained(tokengate.unpatch(model)) == before
    with pytest.warns(FrozenAdapterWarning):
        tokengate.load(model, tmp_path)


def test_one_that_is_trained_along_or_was_not_in_training_is_not_spoken_of(tmp_path):
    model = peft.get_peft_model(llama(), LORA)
    before = trained(model)
    tokengate.patch(model, ["k_proj"], train=["lora_A", "lora_B"])
    assert trained(model) > before
    plain = peft.get_peft_model(llama(), LORA)
    plain.save_pretrained(tmp_path)
    tokengate.patch(peft.PeftModel.from_pretrained(llama(), tmp_path), ["k_proj"])
