"""What is written is on the disk when writing returns, or an OSError says why it is not."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import tokengate
from tokengate.files import atomic_write
from tokengate.files.atomic_write import make_folder, write_atomically, write_text

posix = pytest.mark.skipif(os.name != "posix", reason="a folder cannot be opened")


def synced_folders(monkeypatch, error=None):
    """The folders whose fsync is called from now on, which fails with the error, if any."""
    found, fsync = [], os.fsync

    def watched(handle):
        if pathlib.Path(f"/proc/self/fd/{handle}").resolve().is_dir():
            found.append(pathlib.Path(f"/proc/self/fd/{handle}").resolve())
            if error is not None:
                raise OSError(error, os.strerror(error))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    return found


linux = pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="asks Linux")


@linux
@pytest.mark.parametrize("write", [
    lambda place: write_text(place / "file", "text"),
    lambda place: tokengate.save(
        tokengate.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["0"], rank=2), place
    ),
], ids=["text", "adapter"])  # fmt: skip
def test_a_new_folder_is_synced_in_those_that_it_lies_in(tmp_path, monkeypatch, write):
    found = synced_folders(monkeypatch)
    place = tmp_path / "a" / "b" / "c"
    write(place)
    assert found[:3] == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert set(found[3:]) == {place}


@linux
def test_an_error_of_the_folders_fsync_is_raised(tmp_path, monkeypatch):
    synced_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_text(tmp_path / "file", "text")


@linux
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path, monkeypatch, error):
    assert synced_folders(monkeypatch, error) == []
    write_text(tmp_path / "made" / "file", "text")
    assert (tmp_path / "made" / "file").read_text() == "text"


def test_a_folder_that_cannot_be_opened_is_written_to(tmp_path, monkeypatch):
    opened = os.open

    def refused(path, *more, **options):
        if pathlib.Path(path).is_dir():
            raise PermissionError(errno.EACCES, "as on Windows")
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "open", refused)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_folder_may_be_there_already_or_be_a_file(tmp_path):
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "file" / "b")


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664])
def test_a_file_that_is_replaced_leaves_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    write_text(path, "before")
    path.chmod(mode)
    write_text(path, "after")
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o7777 == mode


@posix
def test_nobody_else_reads_what_is_being_written(tmp_path):
    path = tmp_path / "file"
    path.touch(0o600)
    modes = []

    def write(new):
        new.write_text("secret")
        modes.extend(each.stat().st_mode & 0o077 for each in tmp_path.iterdir())

    write_atomically(path, write)
    assert modes == [0, 0]  # of the file, and of the folder beside it


FULL = """
import resource, signal, sys, torch, tokengate
from tokengate.integrations.hf_peft import export_peft
model = torch.nn.Sequential(torch.nn.Linear(256, 256))
tokengate.patch(model, ["0"], rank=64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
for write in (tokengate.save, export_peft):
    try:
        write(model, sys.argv[1])
    except OSError as error:
        print(error.errno, "adapter_model.safetensors" in str(error))
"""


@posix
def test_a_disk_without_room_is_an_os_error(tmp_path):
    """It cannot be filled here; a limit for the size of files is met at the same place."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{errno.EFBIG} True"] * 2, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_safetensors_errors_without_a_number_are_os_errors_too(tmp_path, monkeypatch):
    def fails(*given):
        raise atomic_write.SafetensorError("something else")

    monkeypatch.setattr(atomic_write, "save_file", fails)
    with pytest.raises(OSError, match="something else"):
        atomic_write.save_tensors({}, tmp_path / "file", {})
