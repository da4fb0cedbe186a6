"""What Hugging Face PEFT's files mean: the keys of its tensors, and what its configuration asks.

Known from its documentation and by running version 0.21; nothing here imports it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.linears.convolution import is_convolution
from tokengate.linears.experts import StackedLinear
from tokengate.names import named_children, named_modules

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

PREFIX = "base_model.model."

# What follows the layer's name in PEFT's keys, for each parameter of a method.
KEYS = {
    "lora": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "dora": {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "adalora": {"P": "lora_B", "E": "lora_E", "Q": "lora_A"},
}

# Modules that PEFT trains and saves along, without being asked, for these task types.
HEADS = {
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def unlike_ours(layer: nn.Module, method: str) -> str | None:
    """How PEFT computes otherwise beside a convolution, as the end of a sentence; None if alike."""
    if not is_convolution(layer):
        return None
    if layer.padding_mode != "zeros" or any(each != 1 for each in layer.dilation):
        return "is a convolution with dilation or other edges than zeros, which PEFT's A has not"
    if layer.groups > 1 and method != "lora":
        return f"is a grouped convolution, for which PEFT's {method} has other rows"
    return None


def in_their_layout(part: str, value: Tensor, layer: nn.Module) -> Tensor:
    """A parameter beside a convolution as PEFT has it: as a convolution's weight; else itself."""
    if not is_convolution(layer) or part in ("P", "E", "Q"):
        return value
    if part == "A":
        return value.view(len(value), layer.in_channels, *layer.kernel_size)
    return value.view(1, -1, 1, 1) if part == "magnitude" else value[..., None, None]


def in_our_layout(part: str, value: Tensor) -> Tensor:
    """The way back: `(rank, in_features)`, `(out_features, rank)`, `(out_features,)`."""
    if value.dim() != 4:
        return value
    return value.flatten() if part == "magnitude" else value.flatten(1)


def adalora_scale(alpha: float, initial_rank: int) -> float:
    """PEFT's factor, which stays the initial rank's when rows are pruned."""
    return alpha / (initial_rank + 1e-5)


# What says nothing about the outputs of the adapter as it was saved: origins, schedules of
# training, and how values were initialised that have others now (`_INITIALISATIONS`).
_SILENT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    *("beta1", "beta2", "deltaT", "orth_reg_weight", "tfinal", "tinit", "total_step"),
}
_READ = {
    *("peft_type", "lora_alpha", "lora_dropout", "modules_to_save", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "target_parameters",
    *("r", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "init_r", "target_r"),
}
# What changes the outputs in a way that has no equal here, and the value that turns it off.
_OFF = {
    **{"bias": "none", "lora_bias": False, "use_qalora": False, "ensure_weight_tying": False},
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config"), None),
    **dict.fromkeys(("layer_replication", "megatron_config", "monteclora_config"), None),
    **dict.fromkeys(("trainable_token_indices", "use_bdlora", "velora_config"), None),
}
# Those that leave the base as it was. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take what they put
# into A and B out of the base's weight, and the first four do so again when PEFT loads the adapter.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def check_known(config: Mapping[str, Any], where: str) -> None:
    """An error if the configuration asks for what has no equal here, or is not known."""
    kind = config["peft_type"]
    if kind not in ("LORA", "ADALORA"):
        raise TokenGateError(
            f"{where} has peft_type={brief(kind)}: only LORA (with or without use_dora) and "
            "ADALORA have an equal here."
        )
    for key, value in config.items():
        if key in _OFF and value not in (_OFF[key], None):
            raise TokenGateError(
                f"{where} has {key}={brief(value)}, which has no equal here: train without it "
                f"({key}={_OFF[key]!r}), or keep the adapter in PEFT."
            )
        # A key of a later version that is not set changes nothing.
        if key not in _SILENT | _READ | _OFF.keys() and value not in (None, {}, []):
            raise TokenGateError(
                f"{where} has {key}={brief(value)}, which is not known here, so that what it does "
                "to the outputs is not either: save the adapter without it, or keep it in PEFT."
            )
    how = config.get("init_lora_weights", True)
    if how not in _INITIALISATIONS:
        raise TokenGateError(
            f"{where} has init_lora_weights={brief(how)}, which changed the base's own weights "
            "too, so that the adapter does not fit the plain base: let PEFT convert it, with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def held_twice(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those of the layers that are children of several modules, or of one under two names."""
    times = Counter(id(c) for _, m in named_modules(model) for _, c in named_children(m))
    modules = dict(named_modules(model, remove_duplicate=False))

    def held(name: str) -> nn.Module | None:
        module = modules.get(name, modules.get(name.rpartition(".")[0]))  # a parameter's owner
        return module.owner if isinstance(module, StackedLinear) else module

    return [name for name in names if times[id(held(name))] > 1]
