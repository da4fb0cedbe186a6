"""Files that are there whole, or as they were before: never in part."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tokengate.errors import TokenGateError, brief

# In seconds. Nobody who is alive leaves a file that long between writing and renaming it.
_ABANDONED = 3600


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file, and put it in the place of `path` once it is on disk.

    It is made in a folder of its own beside `path`, with all that libraries make meanwhile. A
    process that is killed leaves what was there before, and perhaps that folder, which a write of
    `path` more than an hour later takes away. The folder of `path` is made where it is not there.

    Raises:
        TokenGateError: `path` is a folder.
        OSError: the file cannot be written.
    """
    if path.is_dir():
        raise TokenGateError(
            f"a file was to be written as {brief(str(path))}, which is a folder: pass the path of "
            "a file, in it or elsewhere."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    beside.mkdir()
    try:
        new = beside / path.name
        new.touch()
        rights = new.stat().st_mode  # of any new file of this user's
        write(new)
        new.chmod(rights)  # safetensors puts a file there that is for nobody else to read
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The same of a text, in UTF-8 and with the ends of lines that it has."""

    def write(new: Path) -> None:
        new.write_bytes(text.encode())

    write_atomically(Path(path), write)


def _remove_abandoned(path: Path) -> None:
    # By age: the number of a process says nothing where several machines share the folder.
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process takes it away, too
            last = max(each.stat().st_mtime for each in (old, *old.iterdir()))
            if time.time() - last > _ABANDONED:
                shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    # Where a folder cannot be opened (Windows), renaming is all that can be done.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
