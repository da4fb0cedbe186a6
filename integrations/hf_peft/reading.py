"""Read an adapter that Hugging Face PEFT saved, trusting nothing in it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokengate import TokenGateError
from tokengate.adapters.folder import CONFIG as OURS
from tokengate.adapters.folder import check_no_file, read_config
from tokengate.adapters.weights import DTYPES, Weights, open_weights
from tokengate.arguments import count, positive, share, switch
from tokengate.errors import brief
from tokengate.integrations.hf_peft.format import (
    CONFIG,
    KEYS,
    PREFIX,
    WEIGHTS,
    adalora_scale,
    check_known,
    in_our_layout,
)
from tokengate.integrations.hf_peft.names import Names
from tokengate.integrations.hf_peft.parameters import Adapted, adapted, check_config, ours, stacks
from tokengate.integrations.hf_peft.pruned_rows import check_unpruned, masks, unpruned
from tokengate.linears.experts import StackedLinear

_TARGETS = ("target_modules", "target_parameters")


@dataclass(frozen=True)
class PeftAdapter:
    """What PEFT saved, in the terms of this library."""

    config: dict[str, Any]
    """`adapter_config.json` as it is."""
    method: str
    options: dict[str, dict[str, Any]]
    """The method's, by layer."""
    parameters: dict[str, dict[str, Tensor]]
    """The method's, by layer: as `modification.named_parameters()` would give them."""
    heads: dict[str, Tensor]
    """Other parameters that were trained, by their name in the model."""
    unread: dict[str, str]
    """The dtypes of buffers beside them, whose values are not read."""
    experts: dict[str, StackedLinear]
    """Those of the layers that are 3-D parameters of the model."""
    unfit: dict[str, str]
    """Parameters that PEFT adapted and that are no such layers of the model, and why."""


def read_peft(folder: str | Path, model: nn.Module | None = None, axes: Any = None) -> PeftAdapter:
    """The adapter in `folder`, as PEFT's `save_pretrained` wrote it.

    Args:
        folder: it.
        model: by which alone values of experts' parameters can be told apart.
        axes: those of its experts, as `patch(experts=...)` has them.

    Raises:
        TokenGateError: the folder is incomplete or damaged, or holds what has no equal here.
    """
    folder = Path(folder)
    where = str(folder / CONFIG)
    config = _config(folder)
    check_known(config, where)
    check_config(config, where)
    if model is None and config.get("target_parameters"):
        raise TokenGateError(
            f"{where} has target_parameters={brief(config['target_parameters'])}, whose values "
            "only the model can tell apart: import_peft it into that (tokengate import, in a "
            "terminal), and save it."
        )
    method = "adalora"
    if config["peft_type"] == "LORA":
        method = "dora" if switch("use_dora", config.get("use_dora") or False) else "lora"
    with open_weights(folder / WEIGHTS) as weights:
        return _read(weights, config, method, where, model, axes)


def _read(
    weights: Weights,
    config: dict[str, Any],
    method: str,
    where: str,
    model: nn.Module | None,
    axes: Any,
) -> PeftAdapter:
    path, present = weights.path, weights.tensors
    with _told_of(where):
        names = Names(config)
    found, heads = _layers_and_heads(weights, config, names, method, where)
    known = {} if model is None else stacks(model, axes)
    with _told_of(where):
        others = {layer: None for layer in found if not names.is_target(layer)}
        own = Adapted({}, {}, list(others))
        if model is not None and config.get("target_parameters"):
            own = adapted(model, known, names, others)
        found = [layer for layer in found if layer not in others or layer in own.experts]
        # By the names of PEFT's wrappers, whose keys are in the file.
        renamed = {layer: name for layer, (name, _) in own.experts.items()}
        options = {
            layer: _options(config, names, method, renamed.get(layer, layer)) for layer in found
        }
    if own.astray:
        asked = [f"{k} {brief(config[k])}" for k in _TARGETS if config.get(k)]
        raise TokenGateError(
            f"{str(path)!r} has values for {own.astray[0]!r}, which the {' and '.join(asked)} of "
            f"{where} leave out, so that PEFT would drop them: correct target_modules."
        )
    pruned = masks(config, found, where) if method == "adalora" else {}
    for layer in found:
        experts = layer in own.experts
        _check_shapes(weights, method, layer, options[layer], pruned.get(layer), experts)
    check_unpruned(weights, pruned, where)
    # Of modules_to_save with buffers: whether one may be left out is for the model to say.
    unread = {key: present[key].dtype for key in heads if present[key].dtype not in DTYPES}
    tensors, _ = weights.values(leave_out=unread)
    parameters = {}
    for layer in found:
        keys = {part: f"{PREFIX}{layer}.{suffix}" for part, suffix in KEYS[method].items()}
        values = {part: in_our_layout(part, tensors.pop(key)) for part, key in keys.items()}
        if method == "adalora":
            values = unpruned(values, pruned.get(layer))
        if layer in own.experts:
            values = ours(values, options[layer]["rank"], own.experts[layer][1])
        parameters[renamed.get(layer, layer)] = values
    return PeftAdapter(
        config,
        method,
        {renamed.get(layer, layer): each for layer, each in options.items()},
        parameters,
        {key.removeprefix(PREFIX): tensors[key] for key in heads if key not in unread},
        {key.removeprefix(PREFIX): dtype for key, dtype in unread.items()},
        dict(own.experts.values()),
        own.unfit,
    )


@contextlib.contextmanager
def _told_of(where: str) -> Iterator[None]:
    """Whatever is wrong with a name, a pattern or a number of the configuration, said of it."""
    try:
        yield
    except re.error as error:
        raise TokenGateError(
            f"{where} has a pattern that is no regular expression ({error}): correct it."
        ) from None
    except TokenGateError as error:
        raise TokenGateError(f"{where} is not as PEFT would have written it: {error}") from None


def _layers_and_heads(
    weights: Weights, config: dict[str, Any], names: Names, method: str, where: str
) -> tuple[list[str], list[str]]:
    """The layers that have values, and the keys of other parameters."""
    found: dict[str, None] = {}
    heads = []
    for key, tensor in weights.tensors.items():
        layer = _layer(key, method)
        if layer is not None and "\n" not in layer:
            found[layer] = None
        elif _is_saved_whole(names, key):
            heads.append(key)
        else:
            raise TokenGateError(
                f"{str(weights.path)!r} has {key!r} of shape {tensor.shape}, which neither "
                f"belongs to {config['peft_type']} as {where} describes it nor to one of its "
                f"modules_to_save, {brief(config.get('modules_to_save'))}: save the adapter "
                "again, without values of the base, as by save_pretrained(folder, "
                "save_embedding_layers=False)."
            )
    if not found:
        raise TokenGateError(f"{str(weights.path)!r} has no adapted layer: save it again.")
    return list(found), heads


def _config(folder: Path) -> dict[str, Any]:
    if (folder / OURS).exists() and not (folder / CONFIG).exists():
        raise TokenGateError(
            f"{folder / OURS!s} is ours, which tokengate.load reads as it is: pass a folder that "
            "PEFT wrote."
        )
    check_no_file(folder)
    for path in (folder, folder / CONFIG, folder / WEIGHTS):
        if path.exists():
            continue
        if path.name == WEIGHTS and (folder / "adapter_model.bin").exists():
            raise TokenGateError(
                f"{str(folder)!r} has its values in 'adapter_model.bin', a pickle, which may run "
                "any code when it is read: if you trust it, load it with PEFT and save it again, "
                "as safetensors."
            )
        # Of adapters that are not called "default".
        named = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG}"))
        hint = f", e.g. {str(folder / named[0])!r}" if named else ""
        raise TokenGateError(
            f"{str(path)!r} does not exist: pass a folder that PEFT's save_pretrained wrote{hint}."
        )
    config, where = read_config(folder / CONFIG), str(folder / CONFIG)
    if "peft_type" not in config:
        hint = ", which tokengate.load reads" if config.get("format") == "tokengate" else ""
        raise TokenGateError(f"{where} has no peft_type{hint}: pass a folder that PEFT wrote.")
    lists = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
    for key in lists:
        value = config.get(key)
        items = [value] if isinstance(value, str) else value or []
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise TokenGateError(
                f"{where} has {key}={brief(value)}: correct it to a list of names."
            )
    if not any(map(config.get, _TARGETS)):
        raise TokenGateError(f"{where} has no target_modules: save the adapter again.")
    if isinstance(config.get("modules_to_save"), str):
        config["modules_to_save"] = [config["modules_to_save"]]
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise TokenGateError(f"{where} has {key}={brief(config[key])}: correct it to a dict.")
    return config


def _layer(key: str, method: str) -> str | None:
    """The layer that a key means; None if it means none."""
    for suffix in KEYS[method].values():
        if key.startswith(PREFIX) and key.endswith(f".{suffix}") and len(key) > len(PREFIX):
            return key[len(PREFIX) : -len(suffix) - 1]
    return None


def _is_saved_whole(names: Names, key: str) -> bool:
    name = key.removeprefix(PREFIX)
    owners = (name[:at] for at, character in enumerate(name) if character == ".")
    return key.startswith(PREFIX) and names.is_saved_whole(owners)


def _options(config: dict[str, Any], names: Names, method: str, layer: str) -> dict[str, Any]:
    dropout = share("lora_dropout", config.get("lora_dropout", 0.0))
    alpha = config.get("lora_alpha", 8)
    if method == "adalora":
        rank = count("init_r", config.get("init_r", 12))
        return {
            "rank": rank,
            "target_rank": min(count("target_r", config.get("target_r", 8), least=0), rank),
            "scale": adalora_scale(positive("lora_alpha", alpha), rank),
            "dropout": dropout,
        }
    rank = names.rank(layer, config.get("r", 8))
    alpha = names.alpha(layer, alpha)
    options = {
        "rank": count(f"the rank of {layer!r}", rank),
        "alpha": positive(f"the alpha of {layer!r}", alpha),
        "dropout": dropout,
    }
    if switch("use_rslora", config.get("use_rslora") or False):
        options["rslora"] = True
    return options


def _check_shapes(
    weights: Weights,
    method: str,
    layer: str,
    options: dict[str, Any],
    mask: list[bool] | None,
    experts: bool,
) -> None:
    path, present = weights.path, weights.tensors
    keys = {part: f"{PREFIX}{layer}.{suffix}" for part, suffix in KEYS[method].items()}
    for key in keys.values():
        if key not in present:
            there = next(k for k in keys.values() if k in present)
            raise TokenGateError(
                f"{str(path)!r} lacks {key!r}, beside {there!r} of shape {present[there].shape}: "
                "save the adapter again."
            )
    rank = options["rank"] if mask is None else sum(mask)
    if experts and present[keys["A"]].shape:
        rank *= max(present[keys["A"]].shape[0] // rank, 1)
    down, up = ("Q", "P") if method == "adalora" else ("A", "B")
    # The layer's own sizes, in which the others have to agree.
    ins, outs = (present[keys[down]].shape or [0])[-1], (present[keys[up]].shape or [0])[0]
    wanted = {down: [rank, ins], up: [outs, rank], "E": [rank, 1], "magnitude": [outs]}
    of_down, of_up = present[keys[down]].shape, present[keys[up]].shape
    if (
        down == "A" and not experts and len(of_down) == len(of_up) == 4
    ):  # beside a convolution, in groups
        part = of_up[1] if of_up[1] and rank % of_up[1] == 0 else rank
        wanted = {down: [rank, *of_down[1:]], up: [outs, part, 1, 1], "magnitude": [1, outs, 1, 1]}
    for part, key in keys.items():
        if present[key].shape != wanted[part]:
            raise TokenGateError(
                f"{str(path)!r} has {key!r} of shape {present[key].shape}, where its configuration "
                f"and the layer's other values ask for {wanted[part]}: save the adapter again."
            )
    for key in keys.values():
        weights.check_dtype(key)
