"""Adapters on the Hub, of which a folder stands in the place."""

import fnmatch
import pathlib
import shutil
import sys
import types

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence

import tokengate
from tokengate import TokenGateError
from tokengate.integrations import hub

host = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the repositories lie, by huggingface_hub's names and arguments."""
    root = tmp_path / "hub"

    kept = set()  # that are private

    def create_repo(repo_id, *, private, exist_ok, token):
        if private and not (root / repo_id).exists():
            kept.add(repo_id)
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def repo_info(repo_id, *, token=None):
        return types.SimpleNamespace(private=repo_id in kept)

    def upload_folder(*, repo_id, folder_path, allow_patterns, delete_patterns, revision,
                      commit_message, token):  # fmt: skip
        to = root / repo_id
        for path in to.iterdir():
            if delete_patterns and any(fnmatch.fnmatch(path.name, p) for p in delete_patterns):
                path.unlink()
        for path in pathlib.Path(folder_path).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, to)
        return f"hub/{repo_id}/commit/1"

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        if not (root / repo_id).exists() or revision not in (None, "main"):
            raise OSError(f"404: {repo_id} at {revision}")
        to = tmp_path / "cache"
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        for path in (root / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, to)
        return str(to)

    def list_repo_files(repo_id, *, revision=None, token=None):
        return [path.name for path in (root / repo_id).iterdir()]

    fakes = {
        "create_repo": create_repo,
        "repo_info": repo_info,
        "upload_folder": upload_folder,
        "snapshot_download": snapshot_download,
        "list_repo_files": list_repo_files,
        "repo_exists": lambda repo_id, *, token=None: (root / repo_id).exists(),
        "hf_hub_download": lambda repo_id, name, *, revision=None, token=None: (
            root / repo_id / name
        ),
    }
    for name, fake in fakes.items():
        assert callable(getattr(host, name))
        monkeypatch.setattr(host, name, fake)
    monkeypatch.chdir(tmp_path)
    return root


def trained():
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj"], rank=2)
    away_from_initialisation(model)
    return model


def base():
    torch.manual_seed(0)
    return Net()


def test_what_is_pushed_is_loaded(place):
    model, x = trained(), torch.randn(2, 5, 8)
    with tokengate.record(model) as rec:
        model(x)
    assert hub.push(model, "user/net", report=rec.report()) == "hub/user/net/commit/1"
    names = {path.name for path in (place / "user/net").iterdir()}
    assert names == {"README.md", "adapter_model.safetensors", "tokengate_config.json"}
    card = (place / "user/net/README.md").read_text()
    assert "tokengate.load(model, 'user/net')" in card
    assert f"Sparsity {100 * rec.report().sparsity:.1f} %" in card
    other = base()
    assert not torch.equal(other(x), model(x))
    tokengate.load(other, "user/net", revision="main")
    assert torch.equal(other(x), model(x))


def test_what_a_repository_has_stays(place):
    hub.push(trained(), "user/net")
    card = place / "user/net/README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    (place / "user/net/notes.txt").write_text("mine")
    (place / "user/net/adapter_config.json").write_text('{"format": "tokengate"}')
    hub.push(tokengate.patch(base(), ["v_proj"], method="dora"), "user/net")
    assert card.read_text().endswith("\nBy hand.\n")
    assert "dora" in card.read_text()
    assert (place / "user/net/notes.txt").read_text() == "mine"
    assert not (place / "user/net/adapter_config.json").exists()


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("model.safetensors", "", ["user/net", "holds a model"]),
        ("adapter_config.json", '{"peft_type": "LORA"}', ["not tokengate's"]),
    ],
)
def test_a_repository_of_something_else_is_refused(place, file, text, words):
    (place / "user/net").mkdir(parents=True)
    (place / "user/net" / file).write_text(text)
    with one_sentence(*words):
        hub.push(trained(), "user/net")
    assert [path.name for path in (place / "user/net").iterdir()] == [file]


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_is_there_is_private_or_not(place, private):
    """What was to be private went into a public one."""
    model = trained()
    hub.push(model, "user/net", private=not private)
    was = [path.read_bytes() for path in sorted((place / "user/net").iterdir())]
    found = "public" if private else "private"
    away_from_initialisation(model)
    with one_sentence(f"private={private}", f"is {found} already"):
        hub.push(model, "user/net", private=private)
    assert [path.read_bytes() for path in sorted((place / "user/net").iterdir())] == was
    hub.push(model, "user/net", private=not private)
    hub.push(model, "user/net")
    assert [path.read_bytes() for path in sorted((place / "user/net").iterdir())] != was


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_is_refused_leaves_no_other_waiting_for_it(place, monkeypatch, rank):
    """`save` gathers what is sharded from all of them, of which the first alone sees the Hub."""
    (place / "user/net").mkdir(parents=True)
    (place / "user/net/model.safetensors").write_text("")
    saves, save = [], tokengate.save
    monkeypatch.setattr(tokengate, "save", lambda *args, **more: saves.append(save(*args, **more)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    if rank:
        assert hub.push(trained(), "user/net") == ""
    else:
        with one_sentence("user/net", "holds a model"):
            hub.push(trained(), "user/net")
    assert len(saves) == 1


def test_a_folder_is_meant_before_a_repository(place, tmp_path):
    hub.push(trained(), "user/net")
    tokengate.save(tokengate.patch(base(), ["v_proj"]), "user/net")
    model = base()
    tokengate.load(model, "user/net")
    assert "blocks.0.v_proj" in tokengate.layers(model)
    with pytest.raises(TokenGateError, match="revision='main'"):
        tokengate.load(base(), "user/net", revision="main")
    with pytest.raises(TokenGateError, match="does not exist"):  # a path is none
        tokengate.load(base(), pathlib.Path("user/other"))


def test_what_is_neither_is_said_in_one_sentence(place, monkeypatch):
    with one_sentence("no folder here", "404"):
        tokengate.load(base(), "user/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with one_sentence("tokengate[hub]"):
        tokengate.load(base(), "user/net")
    with one_sentence("tokengate[hub]"):
        hub.push(trained(), "user/net")


def test_the_real_library_reads_its_own_cache(tmp_path, monkeypatch):
    """Without a network, of a repository that was fetched before."""
    snapshot = tmp_path / "models--user--net" / "snapshots" / ("a" * 40)
    model = trained()
    tokengate.save(model, snapshot)
    refs = tmp_path / "models--user--net" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other, x = base(), torch.randn(2, 5, 8)
    tokengate.load(other, "user/net")
    assert torch.equal(other(x), model(x))
    with pytest.raises(TokenGateError, match="no folder here"):
        tokengate.load(base(), "user/unknown")
