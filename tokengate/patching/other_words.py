"""What other libraries and papers call the arguments of `patch`: one table, asked in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tokengate.arguments import check_word
from tokengate.errors import TokenGateError, brief
from tokengate.gates.registry import options_of
from tokengate.linears.by_name import is_from

# The same by another name.
SAME = {
    "r": "rank",
    "init_r": "rank",
    "lora_r": "rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "target_modules": "targets",
    "target_parameters": "targets",
    "target": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "train",
    "peft_type": "method",
    "lambda_": "penalty",
    "lam": "penalty",
    "lambd": "penalty",
    "threshold": "tau",
}
# What is said in another way, as the end of a sentence.
OTHERWISE = {
    "use_dora": 'pass method="dora"',
    "rank_pattern": 'pass a dict as rank, e.g. rank={"*.q_proj": 16, "*": 8}',
    "alpha_pattern": 'pass a dict as alpha, e.g. alpha={"*.q_proj": 32, "*": 16}',
    "layers_to_transform": 'pass globs as targets, e.g. targets=["*.layers.[01].*.q_proj"]',
    "layers_pattern": 'pass globs as targets, e.g. targets=["*.layers.[01].*.q_proj"]',
    "bias": (
        'leave it out for "none", as the bias of a patched layer stays frozen, and name others: '
        'train=["*.LayerNorm.bias"]'
    ),
    "task_type": (
        "leave it out, as the model keeps its own class and forward, and pass "
        'train="head" where a classifier is to be trained along, as PEFT does for "SEQ_CLS"'
    ),
    "inference_mode": "leave it out, and call model.eval()",
    "init_lora_weights": "leave it out, as every method begins with M(x) = 0",
    "fan_in_fan_out": "leave it out, as a layer's own class tells",
    "adapter_name": "leave it out, and name an adapter in tokengate.load(model, folder, name=...)",
    "config": "pass what is in it, each as an argument of patch",
    "peft_config": "pass what is in it, each as an argument of patch",
    "name": "leave it out, and name an adapter in tokengate.load(model, folder, name=...)",
    "layers": 'pass globs as targets, e.g. targets=["*.layers.[01].*.q_proj"]',
    "dtype": "leave it out, as a modification has the dtype of its layer: call model.to(dtype)",
    "device": "leave it out, as a modification lies beside its layer: call model.to(device)",
    "tinit": "pass it to tokengate.RankAllocator as initial_warmup",
    "tfinal": "pass it to tokengate.RankAllocator as final_warmup",
    "deltaT": "pass it to tokengate.RankAllocator as interval",
    "total_step": "pass it to tokengate.RankAllocator as total_steps",
    "beta1": "pass it to tokengate.RankAllocator",
    "beta2": "pass it to tokengate.RankAllocator",
    "orth_reg_weight": "add that times tokengate.orthogonality(model) to the loss",
    "trainable_token_indices": "name the embedding, which is then trained whole: train=[...]",
    "alora_invocation_tokens": (
        "run the model within tokengate.restrict(model, tokengate.after(token_ids))"
    ),
    "lr": "pass it to tokengate.param_groups(model, lr=...)",
    "s": "pass it to tokengate.param_groups(model, lr=..., s=...)",
    "total_steps": "pass it to tokengate.param_groups(model, lr=..., total_steps=...)",
    "sparsity": "pass it to tokengate.SparsitySchedule or tokengate.calibrate",
    "target_sparsity": "pass it to tokengate.SparsitySchedule",
}
# Of PEFT's configurations, how a method is told there.
_METHODS = {"LORA": "lora", "ADALORA": "adalora"}
# Where a string is a regular expression, as PEFT reads it, unless it is this one.
_EXPRESSIONS, _ALL = ("target_modules", "exclude_modules"), "all-linear"
# What is said of a configuration's file, of where it runs, or by `method`.
_SILENT = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("runtime_config", "megatron_core", "qalora_group_size", "fan_in_fan_out", "use_dora"),
}


def check_words(kind: type, options: Mapping[str, Any]) -> None:
    """An error, which says how it is said here, if what `kind` does not take is another's word."""
    for name, value in options.items():
        if name not in options_of(kind):
            check_word("patch", name, value, SAME, OTHERWISE)


def check_no_config(*given: Any) -> None:
    """An error, which writes it out as arguments of `patch`, if one is a configuration of PEFT.

    What of it is no argument is told beside them, so that nothing of it is lost.
    """
    for config in given:
        if is_from(config, "peft", "PeftConfig"):
            raise TokenGateError(
                f"patch was given a {type(config).__name__} of PEFT{_written_out(config)}."
            )


def _written_out(config: Any) -> str:
    """The end of the sentence."""
    kind = getattr(config, "peft_type", None)
    method = _METHODS.get(str(getattr(kind, "value", kind)))
    if method is None:
        return (
            ", whose method is not here: pass targets= and a method of tokengate's, or one of your "
            "own (tokengate.register)"
        )
    # AdaLoRA's ranks are init_r, whatever the r that it has from LoRA.
    ignored = _SILENT | ({"r"} if method == "adalora" else set())
    said: dict[str, Any] = {
        "targets": None,
        "method": "dora" if getattr(config, "use_dora", False) else method,
    }
    beside = []
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in ignored or not value:
            continue
        if name in SAME:
            if isinstance(value, str) and name in _EXPRESSIONS and value != _ALL:
                value = re.compile(value)
            value = sorted(value) if isinstance(value, set) else value
            if (ours := SAME[name]) != "method":
                before = said.get(ours)  # as layers, beside parameters of experts
                said[ours] = value if before is None else [*_listed(before), *_listed(value)]
        elif value != field.default:
            how = OTHERWISE.get(name, "there is nothing equal here")
            beside.append(f"; for its {name}={brief(value)}, {how}")
    shown = ", ".join(f"{k}={v!r}" for k, v in said.items() if v is not None)
    return (
        f": its options are arguments here, as in tokengate.patch(model, {shown}){''.join(beside)}"
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
