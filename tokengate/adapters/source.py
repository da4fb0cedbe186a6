"""Where an adapter is read from: a folder, or a repository on Hugging Face's Hub."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from tokengate.errors import TokenGateError

# As the Hub writes the name of a repository.
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def local(folder: str | Path, revision: str | None) -> Path:
    """The folder itself, or that into which a repository of this name was downloaded.

    A folder that is here is meant before a repository; a `Path` never means one.

    Raises:
        TokenGateError: there is neither; or a folder was asked for in a revision.
    """
    found = Path(folder)
    named = isinstance(folder, str) and _REPOSITORY.fullmatch(folder) is not None
    if named and not found.exists():
        # The library imports no integration, which all import it. As the command line does for its
        # commands, it looks for this one when it is asked for what no folder has.
        hub = importlib.import_module("tokengate.integrations.hub")
        downloaded: Path = hub.download(folder, revision)
        return downloaded
    if revision is not None:
        raise TokenGateError(
            f"load was given revision={revision!r} of {str(folder)!r}, which is a folder here, or "
            "no name of a repository: leave it out."
        )
    return found
