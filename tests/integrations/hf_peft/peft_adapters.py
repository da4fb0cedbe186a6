"""Models with adapters that Hugging Face PEFT made, saved and loaded."""

import copy
import json

import pytest
import torch
from models import one_sentence, snapshot

from tokengate.integrations.hf_peft import import_peft

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
peft = pytest.importorskip("peft", reason="the test extra is not installed")

QUIET = [
    # transformers renamed what PEFT still asks for.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # PEFT says so of every rank_pattern of AdaLoRA, its own included, and follows it.
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match.*lora_E:RuntimeWarning"),
]

METHODS = ["lora", "dora", "adalora"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64, initializer_range=0.1, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.1, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


TARGETS = {
    llama: ["q_proj", "v_proj", "down_proj"],
    bert: ["query", "attention.output.dense"],
    gpt2: ["c_attn", "mlp.c_proj"],
}
MODELS = list(TARGETS)
IDS = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(4))


def base_of(make, dtype=torch.float64):
    torch.manual_seed(7)
    model = make().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they are 0 in a new model
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def randomised(model, parts=("lora_", "modules_to_save")):
    """PEFT's parameters away from their initial values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ranknum" in name or not any(part in name for part in parts):
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            around = parameter if "magnitude" in name else torch.zeros_like(parameter)
            parameter.copy_(around + 0.3 * noise)
    return model


def peft_config(method, targets, **options):
    if method == "adalora":
        options = {"init_r": 4, "target_r": 2, "total_step": 10, **options}
        kind = peft.AdaLoraConfig
    else:
        options = {"r": 4, "use_dora": method == "dora", **options}
        kind = peft.LoraConfig
    return kind(**{"lora_alpha": 6, "target_modules": targets, **options})


def saved_by_peft(base, folder, method="lora", targets=("q_proj", "v_proj"), **options):
    if isinstance(base, transformers.GPT2LMHeadModel):
        options["fan_in_fan_out"] = True
    targets = targets if isinstance(targets, str) else list(targets)
    config = peft_config(method, targets, **options)
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    randomised(model).eval()
    model.save_pretrained(folder)
    return model


def loaded_by_peft(base, folder):
    model = copy.deepcopy(base)
    return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


def close(a, b, dtype=torch.float64):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def refused(model, folder, *words, **options):
    """The one sentence that import_peft answers, having touched nothing."""
    before = snapshot(model)
    with one_sentence(*words) as text:
        import_peft(model, folder, **options)
    assert snapshot(model) == before
    return text[0]
