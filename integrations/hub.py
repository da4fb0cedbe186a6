"""Adapters on Hugging Face's Hub: fetched by `tokengate.load(model, "user/name")`, sent by `push`.

    from tokengate.integrations import hub
    hub.push(model, "user/name", report=report)

huggingface_hub is imported by what needs it (`pip install 'tokengate[hub]'`). `download` is the
library's seam: `tokengate.load` looks for this module when no folder has the name it was given.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokengate
from tokengate import SparsityReport, TokenGateError
from tokengate.adapters.card import CARD, write_card
from tokengate.adapters.destination import check_destination, check_no_model
from tokengate.adapters.folder import CONFIG, OLD_CONFIG, WEIGHTS, read_adapter
from tokengate.errors import brief
from tokengate.sharding import in_processes


def download(repository: str, revision: str | None = None) -> Path:
    """The folder in huggingface_hub's cache with the adapter of a repository.

    Raises:
        TokenGateError: huggingface_hub is not installed, or does not get it.
    """
    host = _host(f"{repository!r} is no folder here")
    try:
        found = host.snapshot_download(
            repository, revision=revision, allow_patterns=[CONFIG, OLD_CONFIG, WEIGHTS]
        )
    except Exception as error:
        raise TokenGateError(
            f"{repository!r} is no folder here, and no repository that huggingface_hub could fetch "
            f"({brief(str(error))}): pass a folder that tokengate.save wrote, or user/name on the "
            "Hub."
        ) from None
    return Path(found)


def push(
    model: nn.Module,
    repository: str,
    *,
    name: str | None = None,
    report: SparsityReport | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "An adapter, by tokengate",
    token: str | None = None,
) -> str:
    """Save the model's adapter into a repository, which is made if it is not there.

    What else the repository has stays there, a card that somebody else wrote as well. Of a model
    that FSDP2 has sharded every process calls it, of which the first sends.

    Args:
        model: a patched model.
        repository: as `user/name`.
        name: of several adapters, as in `tokengate.save`; so is `report`.
        report: whose table comes into the card.
        private: whether the repository is to be: a new one is made so, and one that is not is
            refused; None for a new one as the account says, or for one as it is.
        revision: the branch; the main one by default.
        message: of the commit.
        token: of the account; that which is logged in by default.

    Returns:
        The address of the commit, or of the repository; empty on processes that send nothing.

    Raises:
        TokenGateError: as of `tokengate.save`; the repository holds a model, or an adapter that is
            not ours, or is not as `private` says; or huggingface_hub is not installed, or is
            refused.
    """
    host = _host(f"push to {repository!r} was asked for")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        # First, as all processes do it together: what is refused later, one of them alone knows.
        tokengate.save(model, folder, name=name, report=report)
        if in_processes() and torch.distributed.get_rank() > 0:
            return ""
        is_there = _asked(repository, lambda: host.repo_exists(repository, token=token))
        if is_there and private is not None:
            info = _asked(repository, lambda: host.repo_info(repository, token=token))
            if info.private != private:
                raise TokenGateError(
                    f"push to {repository!r} was asked for with private={private}, and the "
                    f"repository is {'private' if info.private else 'public'} already: change "
                    "that on the Hub, or leave private= out."
                )
        fetch = partial(_fetch, host, repository, revision, token, folder)
        there = _asked(repository, fetch) if is_there else []
        check_no_model(there, repository, "push")
        check_destination(folder, "push")
        write_card(folder, read_adapter(folder).config, report, repository)

        def send() -> Any:
            host.create_repo(repository, private=private, exist_ok=True, token=token)
            return host.upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                allow_patterns=[WEIGHTS, CONFIG, CARD],
                # Ours, or it would have been refused.
                delete_patterns=[OLD_CONFIG] if OLD_CONFIG in there else None,
                revision=revision,
                commit_message=message,
                token=token,
            )

        return str(_asked(repository, send))


def _fetch(host: Any, repository: str, revision: str | None, token: str | None, to: Path) -> Any:
    """What the repository has that is added to or asked what it is; the names of all its files."""
    there = host.list_repo_files(repository, revision=revision, token=token)
    for name in {CARD, OLD_CONFIG} & set(there):
        found = host.hf_hub_download(repository, name, revision=revision, token=token)
        (to / name).write_bytes(Path(found).read_bytes())
    return there


def _asked(repository: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        raise TokenGateError(
            f"push to {repository!r} was refused by the Hub or did not reach it "
            f"({brief(str(error))}): log in, or save the adapter in a folder."
        ) from error


def _host(asked: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise TokenGateError(
            f"{asked}, and huggingface_hub, which knows the Hub, is not installed: pip install "
            "'tokengate[hub]', or pass a folder that tokengate.save wrote."
        ) from None
