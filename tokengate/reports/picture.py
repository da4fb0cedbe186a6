"""A report as a picture: what draws it is an integration, since it needs matplotlib."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tokengate.errors import TokenGateError, brief
from tokengate.files.atomic_write import write_atomically


def picture(figure: Any, path: str | Path | None) -> Any:
    """The figure, written to `path` as well, in the format of its ending.

    Raises:
        TokenGateError: matplotlib has no format of that ending.
        OSError: the file cannot be written.
    """
    if path is not None:
        path = Path(path)
        # matplotlib would write a name without an ending with one, and so another file.
        if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
            raise TokenGateError(
                f"a picture was to be written as {brief(str(path))}: end its name in .png, "
                ".pdf, .svg or another of matplotlib's formats."
            )
        write_atomically(path, figure.savefig)
    return figure


def load_plots() -> Any:
    """The module that draws, `tokengate.integrations.plots`; an error without matplotlib."""
    try:
        # By its name, because integrations import tokengate and never the reverse.
        return importlib.import_module("tokengate.integrations.plots")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise TokenGateError(
            "a picture was asked for without matplotlib: install it, pip install 'tokengate[viz]'."
        ) from None
