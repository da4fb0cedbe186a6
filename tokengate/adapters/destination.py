"""Where an adapter may be written: nothing that somebody else put there is lost or led astray."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tokengate.adapters.folder import OLD_CONFIG, read_config
from tokengate.errors import TokenGateError

# What libraries read a whole model from.
_MODEL = re.compile(
    r"(diffusion_|open_clip_)?(pytorch_)?model([.-].*)?\.(safetensors|bin)(\.index\.json)?"
    r"|tf_model\.h5|flax_model\.msgpack|model_index\.json|modules\.json|.*\.gguf"
)


def check_destination(folder: Path, caller: str = "save") -> None:
    """An error if `folder` is a file, or holds a model, or an adapter that is not ours."""
    if folder.exists() and not folder.is_dir():
        raise TokenGateError(f"{caller} was given {str(folder)!r}, which is a file: name a folder.")
    if not folder.exists():
        return
    check_no_model((path.name for path in folder.iterdir()), str(folder), caller)
    if (folder / OLD_CONFIG).exists() and not has_old_config(folder):
        raise TokenGateError(
            f"{caller} was given {str(folder)!r}, whose {OLD_CONFIG} is of an adapter that is not "
            "tokengate's and would be replaced: name another folder."
        )


def check_no_model(names: Iterable[str], where: str, caller: str) -> None:
    """An error if one of these files is read as a whole model."""
    for name in sorted(names):
        if _MODEL.fullmatch(name):
            raise TokenGateError(
                f"{caller} was given {where!r}, which holds a model ({name!r}): an adapter has a "
                "place of its own, so name another one."
            )


def has_old_config(folder: Path) -> bool:
    """Whether an adapter of ours is there whose configuration has the name of earlier versions."""
    try:
        return read_config(folder / OLD_CONFIG).get("format") == "tokengate"
    except TokenGateError:  # none there, or none that could be read
        return False
