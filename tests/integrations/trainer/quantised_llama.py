"""A tiny quantised Llama, read from a folder as users do; also for processes of their own."""

import torch
import transformers
from models import away_from_initialisation
from trainer_runs import Halt, trainer

import tokengate
from tokengate.integrations.trainer import TokenGateTrainer

QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8 bit": {"load_in_8bit": True},
    "int8 of torchao": None,
}


def save_base(folder):
    """Rows of whole quantisation blocks."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, pad_token_id=0, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def base(folder, kind="nf4"):
    if QUANTISED[kind] is None:
        from torchao.quantization import Int8WeightOnlyConfig

        quantisation = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantisation = transformers.BitsAndBytesConfig(**QUANTISED[kind])
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, dtype=torch.float32
    )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # with which evaluating ends all gradients
    return model


def patched(folder, kind="nf4", method="lora"):
    model = base(folder, kind)
    torch.manual_seed(0)
    tokengate.patch(model, ["q_proj", "v_proj", "up_proj"], method, rank=4, tau=0.3, penalty=1e-4)
    return away_from_initialisation(model, 0.1)


def resumable(folder, source, more=()):
    """Of a DoRA, with a schedule and half an epoch."""
    options = {"max_steps": 8, "gradient_accumulation_steps": 2, "warmup_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 3}
    model = patched(source, method="dora")
    return trainer(folder, model, kind=TokenGateTrainer, more=more, **options, **saving)[0]


def halting(folder, source, connection):
    torch.set_num_threads(1)
    resumable(folder, source, [Halt(5, connection)]).train()
