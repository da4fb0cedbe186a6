"""A Trainer's checkpoints: which were saved to their end, and what one has beside the Trainer's.

Where a model is divided over processes its optimiser's checkpoint has room for the state of its
parameters alone, and where there are several each was given batches of its own, of which a
`SparsitySchedule` knows the last. Ours is then in files of its own, one of each process; more
processes than there were go on from that of the first.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.files.atomic_write import write_atomically

#: What `TokenGateCallback` has to remember of a training on several processes: the first's file.
STATE = "tokengate_training.pt"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint; None of a folder that is none by its name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else None


def is_whole(folder: Path) -> bool:
    """Whether it has the Trainer's state, which is written last, and all of that."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def begin(folder: Path) -> None:
    """No state of an earlier one says of a checkpoint that is now saved that it is whole."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)


def check_whole(folder: Path) -> None:
    """An error if a process was killed while it saved this checkpoint."""
    if not is_whole(folder):
        raise TokenGateError(
            f"{str(folder)!r} was not saved to its end, as its {TRAINER_STATE_NAME} is missing or "
            "broken: pass an earlier checkpoint, or resume_from_checkpoint=True for the last whole "
            "one."
        )


def last_checkpoint(output: Path) -> str | None:
    """The last that is whole; None where there is no checkpoint at all.

    Raises:
        TokenGateError: there are checkpoints, and none of them is whole.

    Warns:
        UserWarning: a later one is not.
    """
    steps = {step: each for each in output.glob("checkpoint-*") if (step := step_of(each))}
    broken = None
    for step in sorted(steps, reverse=True):
        if is_whole(steps[step]):
            if broken is not None:
                warnings.warn(
                    f"{str(broken)!r} was not saved to its end, so that the training goes on from "
                    f"{str(steps[step])!r}.",
                    stacklevel=3,
                )
            return str(steps[step])
        broken = broken or steps[step]
    if broken is not None:
        raise TokenGateError(
            f"resume_from_checkpoint=True found only checkpoints that were not saved to their end, "
            f"e.g. {str(broken)!r}: train from the beginning, without resume_from_checkpoint=."
        )
    return None


def _own(folder: Path) -> Path:
    rank = torch.distributed.get_rank()
    return folder / STATE if rank == 0 else (folder / STATE).with_stem(f"tokengate_training_{rank}")


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """That of this process, beside the Trainer's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(_own(folder), lambda path: torch.save(state, path))


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` left, on the CPU; empty where it left nothing.

    Raises:
        TokenGateError: the file is damaged.
    """
    file = _own(folder) if _own(folder).exists() else folder / STATE
    if not file.exists():
        return {}
    try:
        found: dict[str, Any] = torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        raise TokenGateError(
            f"{str(file)!r} could not be read ({brief(str(error))}): resume from another "
            "checkpoint."
        ) from None
    return found
