"""Read files that others wrote: regular ones alone, and no more of them than was asked for."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from tokengate.errors import TokenGateError, brief


def open_regular(path: str | Path) -> BinaryIO:
    """The file, opened for reading; its bytes end, and reading them waits for nobody.

    A pipe may never be written to, and a device never ends.

    Raises:
        TokenGateError: it is something else than a regular file.
        OSError: it cannot be opened.
    """
    # Before it is opened, which a device may take for an order, and after it: another may be there.
    _check(path, os.stat(path).st_mode)
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    try:
        _check(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def read_text(path: str | Path, most: int) -> str:
    """All of a file in UTF-8, if it has at most so many bytes.

    Raises:
        TokenGateError: it is larger, or no regular file.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    with open_regular(path) as file:
        # What the size says may be wrong a moment later, and is 0 of what a system makes up.
        size = os.fstat(file.fileno()).st_size
        found = file.read(most + 1) if size <= most else b""
    if max(size, len(found)) > most:
        raise TokenGateError(
            f"{brief(str(path))} has {size:,} bytes, and at most {most:,} are read: pass another "
            "file."
        )
    return found.decode("utf-8")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise TokenGateError(
            f"{brief(str(path))} is {kind}, where a file was to be read: pass a regular file."
        )
