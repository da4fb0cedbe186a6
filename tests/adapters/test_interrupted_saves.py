"""A save that is killed, or meets another: the folder holds one adapter whole."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from saved_adapters import fresh, refused, same, trained, values

import tokengate
from tokengate.adapters import folder as adapter_folder


def test_what_killed_saves_left_is_taken_away_when_nobody_can_be_writing_it(tmp_path):
    tokengate.save(trained("lora"), tmp_path)
    names = [".adapter_model.safetensors.0123abcd.tmp", ".tokengate_config.json.0123abcd.tmp"]
    names += ["notes.tmp", ".other.tmp"]
    for hours in (0.9, 1.1):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "half").write_bytes(b"1")
            for path in (tmp_path / name / "half", tmp_path / name):
                os.utime(path, (time.time() - hours * 3600,) * 2)
        tokengate.save(trained("lora"), tmp_path)
        left = {path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"}
        assert left == set(names if hours < 1 else names[2:])
    # A large file may take long to write, in a folder that changed when it was begun.
    (tmp_path / names[0]).mkdir()
    (tmp_path / names[0] / "half").write_bytes(b"1")
    os.utime(tmp_path / names[0], (time.time() - 7200,) * 2)
    tokengate.save(trained("lora"), tmp_path)
    assert (tmp_path / names[0]).exists()


@pytest.mark.parametrize("moment", ["adapter_model.safetensors", "tokengate_config.json"])
@pytest.mark.parametrize("before", [True, False])
def test_a_save_within_a_save_leaves_one_of_the_two(tmp_path, monkeypatch, moment, before):
    """What another process does just before or after one of the two files is put in place."""
    tokengate.save(trained("lora"), tmp_path)
    put, others = os.replace, []

    def interrupted(source, target):
        if os.path.basename(target) != moment or others:
            return put(source, target)
        others.append(moment)
        if before:
            tokengate.save(trained("dora"), tmp_path)
        put(source, target)
        if not before:
            tokengate.save(trained("dora"), tmp_path)

    monkeypatch.setattr(os, "replace", interrupted)
    tokengate.save(trained("adapter"), tmp_path)
    assert others
    other = fresh()
    tokengate.load(other, tmp_path)
    last = "adapter" if before and moment == "adapter_model.safetensors" else "dora"
    assert same(values(other), values(trained(last)))


@pytest.mark.parametrize("step", ["_text", "open_weights", "_check_tensors"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_is_replaced_while_it_is_read_is_of_one_adapter(tmp_path, monkeypatch, step, method):
    def newer():
        model = trained(method)
        for layer in tokengate.layers(model).values():
            layer.gate.penalty = 0.5
            layer.modification.A.data.neg_()
        return model

    older = trained("lora")
    tokengate.save(older, tmp_path)
    read, times = getattr(adapter_folder, step), []

    def replaced(*args):
        times.append(step)
        if len(times) == 1:
            tokengate.save(newer(), tmp_path)
        return read(*args)

    monkeypatch.setattr(adapter_folder, step, replaced)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert times
    # The weights that were opened are read to their end, and the configuration is theirs.
    wanted, penalty = (older, 0.25) if step == "_check_tensors" else (newer(), 0.5)
    assert same(values(other), values(wanted))
    assert {layer.gate.penalty for layer in tokengate.layers(other).values()} == {penalty}


def test_a_folder_that_is_always_replaced_while_it_is_read_ends_in_an_error(tmp_path, monkeypatch):
    tokengate.save(trained(), tmp_path)
    with open(tmp_path / "adapter_model.safetensors", "r+b") as file:
        file.write(b"\0")
    read, times = adapter_folder._text, []

    def touched(path):
        times.append(path)
        os.utime(tmp_path / "tokengate_config.json", ns=(0, 10**9 * len(times)))
        return read(path)

    monkeypatch.setattr(adapter_folder, "_text", touched)
    refused(fresh(), tmp_path, "no safetensors file")
    assert 1 < len(times) <= 20


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    tokengate.save(trained("lora"), tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        tokengate.save(trained("dora"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_a_save_killed_between_its_two_files_is_the_new_one(tmp_path):
    tokengate.save(trained("lora"), tmp_path)
    old = (tmp_path / "tokengate_config.json").read_bytes()
    tokengate.save(trained("dora"), tmp_path)
    (tmp_path / "tokengate_config.json").write_bytes(old)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert same(values(other), values(trained("dora")))
    # Once more, over an interrupted one.
    tokengate.save(trained("adalora"), tmp_path)
    other = fresh()
    tokengate.load(other, tmp_path)
    assert same(values(other), values(trained("adalora")))
    # What is not of the save before is no interruption.
    tokengate.save(trained("adapter"), tmp_path)
    (tmp_path / "tokengate_config.json").write_bytes(old)
    refused(fresh(), tmp_path, "lacks", "blocks.0.q_proj.modification.A")


# Imports torch once, and is forked for every kill. A child saves the one adapter over the other and
# says "here" and waits when it comes to its n-th operation on files, or, where n is negative, saves
# them in turns, and says so after -n saves without waiting.
SAVER = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
import torch
torch.set_num_threads(1)
from saved_adapters import trained
import tokengate
models = [trained("lora", rank=4), trained("dora", rank=8)]

def say(word):  # in one piece, which print is not where nothing is buffered
    os.write(1, f"{word}\\n".encode())

def save(n):
    left = n
    def come_to(event, arguments):
        nonlocal left
        if event.partition(".")[0] not in ("open", "os", "shutil"):
            return
        if left == 0:
            say("here")
            signal.pause()
        left -= 1
    if n >= 0:
        sys.addaudithook(come_to)
        tokengate.save(models[1], sys.argv[2])
        say("done")
    while n < 0:
        for model in models:
            tokengate.save(model, sys.argv[2])
            n += 1
            if n == 0:
                say("here")
            n = n or -(10**9)

for line in sys.stdin:
    child = os.fork()
    if not child:
        save(int(line))
        os._exit(0)
    say(child)
    os.waitpid(child, 0)
"""


def test_killed_at_any_moment_the_folder_loads(tmp_path):
    folder = tmp_path / "adapter"
    first = trained("lora", rank=4)
    wanted = [values(first), values(trained("dora", rank=8))]
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])

    def found_after(server, n):
        """Which of the two is there, and whether files were left, of one killed at moment n."""
        tokengate.save(first, folder)
        server.stdin.write(f"{n}\n")
        server.stdin.flush()
        said = {server.stdout.readline().strip() for _ in range(2)}  # in either order
        (child,) = (int(each) for each in said if each.isdigit())
        if "done" in said:
            return None
        os.kill(child, signal.SIGKILL)
        other = fresh()
        tokengate.load(other, folder)
        found = [same(values(other), each) for each in wanted]
        names = {path.name for path in folder.iterdir()}
        left = {name for name in names if name.startswith(".")}
        assert names - left == {"tokengate_config.json", "adapter_model.safetensors", "README.md"}
        assert all(name.endswith(".tmp") for name in left)
        for name in left:
            shutil.rmtree(folder / name)
        return found.index(True), bool(left)

    with subprocess.Popen(
        [sys.executable, "-c", SAVER, paths, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        moments = []
        while (found := found_after(server, len(moments))) is not None:
            moments.append(found)
        for saves in range(1, 13):  # in the middle of whatever comes next
            assert found_after(server, -saves) is not None
        server.stdin.close()
    # The old one up to a moment and the new one from it on, with files half made before it.
    kept = [index for index, _ in moments]
    assert kept == sorted(kept)
    assert {*kept} == {0, 1}
    assert {(0, True), (0, False)} <= {*moments}
    assert len(moments) > 10
