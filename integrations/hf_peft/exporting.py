"""The adapter of a patched model as PEFT would have written it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tokengate import TokenGateError
from tokengate.adapters.saving import trained_beside, values_of, what_modifies
from tokengate.arguments import switch
from tokengate.errors import brief
from tokengate.integrations.hf_peft import writing
from tokengate.integrations.hf_peft.format import (
    KEYS,
    PREFIX,
    held_twice,
    in_their_layout,
    unlike_ours,
)
from tokengate.integrations.hf_peft.parameters import check_writable, theirs, wrapped
from tokengate.layers.folded import base_layer
from tokengate.sharding import is_sharded


def export_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    ungated: bool = False,
    base_model_name: str | Path | None = None,
    task_type: str | None = None,
) -> None:
    """Write the adapter of a patched model as PEFT would, so that PEFT loads it to equal outputs.

    PEFT has no gates. So every gate must be open for sure (`gate=False`, tau <= 0, or folded), or
    `ungated=True` says that every position shall be modified. Each layer keeps its own rank and
    scale. AdaLoRA's rows that were pruned are left out; its schedule is not PEFT's, so set
    `total_step` and the rest before training goes on there. Experts' 3-D parameters, with LoRA
    alone, become `target_parameters`. Trained parameters become
    `modules_to_save`, of whole modules.

    Args:
        model: a patched model.
        folder: made if it is not there. PEFT's files in it are replaced.
        ungated: whether gates that may close are left out.
        base_model_name: what `AutoPeftModel` shall load as the base, a name or folder.
        task_type: e.g. "CAUSAL_LM", what PEFT chooses its class of model by.

    Raises:
        TokenGateError: a gate may close, a method or a mixture of them has no equal in PEFT, or
            what was trained beside the layers is no whole module; nothing is written.
        OSError: the folder cannot be written.
    """
    patched = what_modifies(model, "export_peft")
    folder = Path(folder)
    if not isinstance(base_model_name, (str, Path, type(None))):
        raise TokenGateError(
            f"base_model_name={brief(base_model_name)} is no name: pass e.g. 'some/llama'."
        )
    method = writing.the_method(patched)
    experts = writing.stacked(patched)
    check_writable(model, experts, [n for n in patched if n not in experts], method)
    if twice := held_twice(model, patched):
        raise TokenGateError(
            f"export_peft found {twice[0]!r} held by several modules, of which PEFT would adapt it "
            "for the first alone: use tokengate.save."
        )
    values = values_of(model, patched, "export_peft")
    writing.check_open(patched, values, switch("ungated", ungated))
    trained = trained_beside(model, patched)
    heads = writing.whole_modules(model, trained)
    writing.check_names(model, list(patched), heads, task_type)
    tensors = {PREFIX + name: values[name] for name in trained}
    wrappers = {name: own for own, name in wrapped(model, frozenset(experts).__contains__).items()}
    for name, layer in patched.items():
        base = base_layer(layer)
        if (reason := unlike_ours(base, method)) is not None:
            raise TokenGateError(f"export_peft found {name!r}, which {reason}: use tokengate.save.")
        own = {part: values[f"{name}.modification.{part}"] for part in KEYS[method]}
        own = theirs(own, base) if name in wrappers else own
        for part, suffix in KEYS[method].items():
            key = f"{PREFIX}{wrappers.get(name, name)}.{suffix}"
            tensors[key] = in_their_layout(part, own[part], base)
    config = {
        "peft_type": "ADALORA" if method == "adalora" else "LORA",
        "task_type": task_type,
        "base_model_name_or_path": None if base_model_name is None else str(base_model_name),
        **writing.shared_config(model, patched, heads),
    }
    if method == "adalora":
        config |= writing.adalora_config(patched, tensors)
    else:
        config |= {**writing.lora_config(patched), "use_dora": method == "dora"}
    writing.check_folder(folder)
    if any(is_sharded(p) for p in model.parameters()) and torch.distributed.get_rank() > 0:
        return
    writing.write(folder, config, tensors)
