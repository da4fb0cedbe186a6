"""A model from its configuration alone, on the meta device: names and shapes without values.

    from tokengate.integrations.model_configs import build, roles_of
    model = build("meta-llama/config.json")      # or a folder, or "timm:vit_base_patch16_224"

transformers and timm are imported by what needs them.
"""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.files.regular import read_text

_TIMM = "timm:"
# In bytes; vocabularies are no part of a configuration.
_LONGEST = 1 << 24
# Which class to build where the configuration names none: the first that has it.
_KINDS = ("AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM")


def build(name: str, architecture: str | None = None) -> nn.Module:
    """The model that `name` describes, in evaluation mode, without memory for its parameters.

    Nothing is downloaded, and no code that comes with a model is run. A base whose configuration
    says that it is quantised is built as if it were not: names and shapes are the same, its memory
    would be less.

    Args:
        name: a `config.json` of transformers, a folder that has one, or `timm:` and a name.
        architecture: a class of transformers; else the one that the configuration names.

    Raises:
        TokenGateError: there is no such configuration, library or class, or the model cannot be
            built without values.
    """
    if name.startswith(_TIMM) and architecture is not None:
        raise TokenGateError(
            f"the architecture {architecture!r} was asked of {name!r}, and is a class of "
            "transformers: leave it out."
        )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values, and there are none
            if name.startswith(_TIMM):
                return _from_timm(name.removeprefix(_TIMM))
            return _from_config(Path(name), architecture)
    except TokenGateError:
        raise
    except Exception as error:
        raise TokenGateError(
            f"{name!r} cannot be built on the meta device ({brief(str(error))}): patch the loaded "
            "model in Python instead."
        ) from None


def roles_of(model: nn.Module, asked: list[str]) -> list[str]:
    """The layers that hold these roles: `vision.roles` for a model of timm, else `language`'s."""
    side = "vision" if type(model).__module__.startswith("timm.") else "language"
    chosen: list[str] = importlib.import_module(f"tokengate.integrations.{side}").roles(
        model, *asked
    )
    return chosen


def _from_timm(name: str) -> nn.Module:
    timm = _host("timm")
    if not timm.is_model(name):
        near = timm.list_models(f"{name.split('_')[0]}*")[:4]
        hint = f", e.g. {', '.join(near)}" if near else ""
        raise TokenGateError(f"timm has no model {name!r}: pass one of timm.list_models(){hint}.")
    model: nn.Module = timm.create_model(name, pretrained=False).eval()
    return model


def _from_config(path: Path, architecture: str | None) -> nn.Module:
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise TokenGateError(
            f"{str(path)!r} does not exist: pass a config.json of transformers, a folder with one, "
            f"or e.g. '{_TIMM}vit_base_patch16_224'."
        )
    transformers = _host("transformers")
    try:
        found = json.loads(read_text(path, _LONGEST))
        config = transformers.AutoConfig.for_model(found.pop("model_type"), **found)
    except Exception as error:
        raise TokenGateError(
            f"{str(path)!r} is no configuration that transformers {transformers.__version__} knows "
            f"({brief(str(error))}): pass a config.json with its model_type."
        ) from None
    named = architecture or next(iter(config.architectures or ()), None)
    if named is None:
        kinds = [getattr(transformers, kind) for kind in _KINDS]
        kind = next((k for k in kinds if type(config) in k._model_mapping), transformers.AutoModel)
    else:
        kind = getattr(transformers, named, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise TokenGateError(
                f"transformers {transformers.__version__} has no model class {named!r}: pass "
                "another architecture, e.g. 'LlamaForCausalLM'."
            )
    dtype = config.dtype or torch.float32
    make = kind.from_config if named is None else kind._from_config
    model: nn.Module = make(config, dtype=dtype).eval()
    return model


def _host(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TokenGateError(
            f"{name} is not installed, which knows this model: pip install 'tokengate[{name}]'."
        ) from None
