"""PEFT's adapters are not patched, and none is put around what is patched."""

from collections import OrderedDict

import pytest
import torch

import tokengate
from tokengate import TokenGateError

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
    tokengate.patch(model, ["up_proj", "q_proj.base_layer"])
    tokengate.patch(model, ["k_proj"])
    assert len(tokengate.layers(model)) == 6
    model.add_adapter("second", LORA)
    model.set_adapter("second")
    tokengate.verify(model, torch.ones(1, 4, dtype=torch.long))
