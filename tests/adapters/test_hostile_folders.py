"""Whatever a stranger puts into a folder, each way to read it ends soon, in one sentence."""

import gc
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from hostile_folders import KINDS, WEIGHTS, answers, own, peft
from models import Net
from places import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

import tokengate
from tokengate.adapters import weights
from tokengate.adapters.folder import read_adapter
from tokengate.integrations.hf_peft import import_peft

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes")

# What the interpreter and torch take of their own accord, in bytes.
NOISE = 64 << 20


def test_the_folders_are_good_without_what_is_wrong_with_them(tmp_path):
    own(tmp_path / "own")
    peft(tmp_path / "peft", {"layers_to_transform": [0], "layers_pattern": "blocks"})
    assert [bool(each) for each in answers(tmp_path / "own")] == [False, True, False]
    assert [bool(each) for each in answers(tmp_path / "peft")] == [True, False, False]


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="asks Linux")
def test_hostile_folders_are_refused_soon_and_in_little_memory(tmp_path):
    assert len(KINDS) >= 60
    for number, make in enumerate(KINDS.values()):
        make(tmp_path / f"{number:03}")
    paths = [ROOT / "tests", ROOT / "tests" / "adapters"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, str(paths[1] / "hostile_folders.py"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=600, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(KINDS)
    for kind, (folder, said, seconds, grown) in zip(KINDS, found, strict=True):
        size = sum(
            path.stat().st_blocks * 512
            for path in (tmp_path / folder).iterdir()
            if path.is_file() and not path.is_symlink()
        )
        for text in said:
            assert text is not None, kind
            assert text.rstrip("\n").isprintable(), kind
            assert text.strip().endswith("."), (kind, text)
            assert len(text) < 2000, kind
        assert seconds < 3 * 2, (kind, seconds)  # three ways to read it
        assert grown <= 2 * size + NOISE, (kind, grown, size)


def test_a_valid_adapter_is_read_though_its_times_keep_changing(tmp_path, monkeypatch):
    own(tmp_path / "own")
    times, read = [], weights.Weights.values

    def touched(self, *args):
        times.append(1)
        os.utime(self.path, ns=(0, 10**9 * len(times)))
        return read(self, *args)

    monkeypatch.setattr(weights.Weights, "values", touched)
    read_adapter(tmp_path / "own")
    assert len(times) == 1


@pytest.mark.parametrize("kept", [True, False])
def test_rows_that_were_pruned_come_back_where_they_are_few(tmp_path, kept):
    tensors = {
        "lora_A": torch.ones(3, 8), "lora_B": torch.ones(16, 3), "lora_E": torch.ones(3, 1),
    }  # fmt: skip
    mask = [True, False, True, True, *[False] * (9 if kept else 99_996)]
    config = {"peft_type": "ADALORA", "init_r": len(mask), "target_r": 2}
    peft(tmp_path / "a", config | {"rank_pattern": {"blocks.0.fc1.lora_E": mask}}, tensors)
    model = Net()
    del model.blocks[1]
    import_peft(model, tmp_path / "a")
    modification = tokengate.layers(model)["blocks.0.fc1"].modification
    assert modification.E.tolist() == [float(each) for each in mask]


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(torch.int64, "I64"), (torch.bool, "BOOL"), (torch.uint8, "U8"), (torch.complex64, "C64")],
)
def test_values_of_other_dtypes_are_refused_and_not_cast(tmp_path, dtype, code):
    """Also where the configuration knows of them: a tau that is True, a matrix of integers."""
    from saved_adapters import forge

    for key in ("blocks.0.fc1.gate.tau", "head.bias"):
        own(tmp_path, train=["head"])
        other = load_file(tmp_path / WEIGHTS)
        other[key] = torch.ones(other[key].shape).to(dtype)
        save_file(other, tmp_path / WEIGHTS)
        forge(tmp_path, lambda c, key=key: c["tensors"][key].update(dtype=code))
        with pytest.raises(tokengate.TokenGateError, match=f"{key}.*as '{code}'"):
            tokengate.load(Net(), tmp_path)


def test_integers_beside_the_layers_are_refused_or_skipped(tmp_path):
    peft(tmp_path / "a", {"modules_to_save": ["head"]})
    file = tmp_path / "a" / WEIGHTS
    head = {"base_model.model.head.weight": torch.ones(3, 8, dtype=torch.int32)}
    head["base_model.model.head.bias"] = torch.ones(3)
    save_file(load_file(file) | head, file)
    model = Net()
    del model.blocks[1]
    with pytest.raises(tokengate.TokenGateError, match=r"'head.weight' is I32 in the adapter"):
        import_peft(model, tmp_path / "a")
    before = model.head.weight.clone()
    assert list(import_peft(model, tmp_path / "a", strict=False)) == ["head.weight"]
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.head.bias, torch.ones(3))


def test_options_of_which_nothing_can_be_made_are_one_sentence(tmp_path):
    from saved_adapters import forge

    own(tmp_path / "own")
    tokengate.load(Net(), tmp_path / "own")
    for rank in (10**18, 10**12):
        forge(
            tmp_path / "own",
            lambda config, rank=rank: config["layers"]["blocks.0.fc1"]["options"].update(rank=rank),
        )
        with pytest.raises(tokengate.TokenGateError, match="fc1"):
            tokengate.load(Net(), tmp_path / "own")


def least(times, done):
    """The least CPU time of so many runs, without the collector, whose turn comes as it likes."""
    found = []
    gc.disable()
    try:
        for _ in range(times):
            began = time.process_time()
            done()
            found.append(time.process_time() - began)
    finally:
        gc.enable()
    return min(found)


def test_reading_is_linear(tmp_path, one_thread):
    model = nn.ModuleList([nn.Linear(8, 8) for _ in range(5000)])
    tokengate.save(tokengate.patch(model, "all-linear", rank=2), tmp_path)
    own_time = least(3, lambda: load_file(tmp_path / WEIGHTS))
    assert least(3, lambda: read_adapter(tmp_path)) <= 3 * own_time
    found, wanted = read_adapter(tmp_path).tensors, load_file(tmp_path / WEIGHTS)
    assert len(found) == 15_000
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_files_are_read_on_machines_of_the_other_order_of_bytes(tmp_path, monkeypatch):
    own(tmp_path / "own")
    with weights.open_weights(tmp_path / "own" / WEIGHTS) as file:
        plain, digest = file.values()
    assert weights._swapped(bytearray(b"abcdefgh"), 4) == bytearray(b"dcbahgfe")
    monkeypatch.setattr(weights, "all_finite", lambda tensor: True)
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    with weights.open_weights(tmp_path / "own" / WEIGHTS) as file:
        swapped, same = file.values()
    assert digest == same
    for key, value in plain.items():
        there = value.flatten().view(torch.uint8).view(-1, value.itemsize)
        assert torch.equal(swapped[key].flatten().view(torch.uint8), there.flip(1).flatten())
