"""What Hugging Face PEFT's files mean: the keys of its tensors, and how its patterns match names.

Known from its documentation and by running version 0.21; nothing here imports it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.names import named_children, named_modules

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


def adalora_scale(alpha: float, initial_rank: int) -> float:
    """PEFT's factor, which stays the initial rank's when rows are pruned."""
    return alpha / (initial_rank + 1e-5)


def by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a layer: the first key that matches counts.

    A key is a regular expression for the name or for what follows a dot of it. Which one is the
    first is what the file says, as when PEFT loads it; PEFT sorts them when it saves.
    """
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def only(name: str) -> str:
    """A key of these patterns that matches this layer alone: `^` does not match behind a dot."""
    return f"^{re.escape(name)}"


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts the module of this name, if its class can be adapted."""
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    if excluded and _named(excluded, name):
        return False
    if in_modules_to_save(config.get("modules_to_save") or (), name):
        return False
    if isinstance(targets, str) or name in targets:
        return _named(targets, name)
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return _named(targets, name)
    index = _layer_index(config.get("layers_pattern") or (), name)
    chosen = chosen if isinstance(chosen, list) else [chosen]
    return _named(targets, name) and index in chosen


def in_modules_to_save(modules: Iterable[str], name: str) -> bool:
    """Whether PEFT never adapts this module because it takes it for a part of these.

    It matches them anywhere in the name, as regular expressions.
    """
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules)


def is_module_to_save(modules: Iterable[str], name: str) -> bool:
    """Whether PEFT saves the module of this name whole: by its end, not by whole components."""
    return any(name.endswith(module) for module in modules)


def _named(patterns: Any, name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _layer_index(patterns: Any, name: str) -> int | None:
    """The first number in the name, or the first behind one of the patterns."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    prefixes = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    for prefix in prefixes:
        if found := re.match(rf"{prefix}\.(\d+)\.", name):
            return int(found[found.re.groups])
    return None


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
    *("r", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "init_r", "target_r"),
}
# What changes the outputs in a way that has no equal here, and the value that turns it off.
_OFF = {
    **{"bias": "none", "lora_bias": False, "use_qalora": False, "ensure_weight_tying": False},
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config"), None),
    **dict.fromkeys(("layer_replication", "megatron_config", "monteclora_config"), None),
    **dict.fromkeys(("target_parameters", "trainable_token_indices", "use_bdlora"), None),
    "velora_config": None,
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
    return [name for name in names if times[id(modules.get(name))] > 1]
