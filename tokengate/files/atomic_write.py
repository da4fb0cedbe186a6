"""Files that are there whole, or as they were before: never in part."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tokengate.errors import TokenGateError, brief

# In seconds. Nobody who is alive leaves a file that long between writing and renaming it.
_ABANDONED = 3600
# What a file system says that knows no fsync of folders, where renaming is all that can be done.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file, and put it in the place of `path` once it is on disk.

    It is made in a folder of its own beside `path`, which nobody else sees into, with all that
    libraries make meanwhile; who may read and write it is as of the file that it replaces. A
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
    make_folder(path.parent)
    _remove_abandoned(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    beside.mkdir(mode=0o700)
    try:
        new = beside / path.name
        new.touch()
        # Without a file before it, those of any new file of this user's.
        rights = (path if path.exists() else new).stat().st_mode
        write(new)
        with open(new, "rb+") as file:
            new.chmod(rights)  # safetensors puts a file there that is for nobody else to read
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _sync_folder(path.parent)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """What safetensors writes, whose errors are as the system's own: a full disk is an OSError."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(str(error)) from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def make_folder(folder: Path) -> None:
    """Make a folder and those that it lies in, so that they are there after a loss of power.

    Raises:
        OSError: it cannot be made.
    """
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


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
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # of Windows, or one that may be written to and not be read
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(handle)
