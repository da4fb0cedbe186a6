"""What other libraries and papers call the arguments of `patch`: one table, asked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokengate.arguments import check_word
from tokengate.errors import TokenGateError
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
    "bias": 'leave it out for "none", or name the biases: train=["*.bias"]',
    "task_type": "leave it out, as the model keeps its own class and forward",
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
    "orth_reg_weight": "add that times tokengate.orthogonality(model) to the loss",
    "trainable_token_indices": "name the embedding, which is then trained whole: train=[...]",
    "lr": "pass it to tokengate.param_groups(model, lr=...)",
    "s": "pass it to tokengate.param_groups(model, lr=..., s=...)",
    "total_steps": "pass it to tokengate.param_groups(model, lr=..., total_steps=...)",
    "sparsity": "pass it to tokengate.SparsitySchedule or tokengate.calibrate",
    "target_sparsity": "pass it to tokengate.SparsitySchedule",
}
# Of PEFT's configurations, how a method is told there.
_METHODS = {"LORA": "lora", "ADALORA": "adalora"}


def check_words(kind: type, options: Mapping[str, Any]) -> None:
    """An error, which says how it is said here, if what `kind` does not take is another's word."""
    for name, value in options.items():
        if name not in options_of(kind):
            check_word("patch", name, value, SAME, OTHERWISE)


def check_no_config(*given: Any) -> None:
    """An error, which writes it out as arguments of `patch`, if one is a configuration of PEFT."""
    for config in given:
        if not is_from(config, "peft", "PeftConfig"):
            continue
        kind = getattr(config, "peft_type", None)
        method = _METHODS.get(str(getattr(kind, "value", kind)), "lora")
        method = "dora" if getattr(config, "use_dora", False) else method
        said: dict[str, Any] = {"targets": None, "method": method}
        for theirs, ours in SAME.items():
            value = getattr(config, theirs, None)
            if value and theirs != "peft_type" and not said.get(ours):
                said[ours] = sorted(value) if isinstance(value, set) else value
        shown = ", ".join(f"{k}={v!r}" for k, v in said.items() if v is not None)
        raise TokenGateError(
            f"patch was given a {type(config).__name__} of PEFT: its options are arguments here, "
            f"as in tokengate.patch(model, {shown})."
        )
