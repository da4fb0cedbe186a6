"""Which checkpoints of a Trainer were saved to their end: a training can go on from those."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from tokengate import TokenGateError


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
