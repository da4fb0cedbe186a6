"""A damaged file is refused in one sentence, or gives the values that were saved: nothing else."""

import contextlib
import json
import pathlib
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from hostile_folders import PEFT_CONFIG, peft
from models import Net
from saved_adapters import fresh, same, trained, values

import tokengate
from tokengate import TokenGateError
from tokengate.integrations.hf_peft import import_peft

WEIGHTS, CONFIG = "adapter_model.safetensors", "tokengate_config.json"
COUNT = 2000


def flip(data, draw):
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def grow(data, draw):
    return data + draw.randbytes(draw.randrange(1, 64))


def insert(data, draw):
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(draw.randrange(1, 16)) + data[at:]


def remove(data, draw):
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.randrange(1, 64) :]


def overwrite(data, draw):
    at = draw.randrange(len(data))
    piece = draw.randbytes(draw.randrange(1, 32))
    return data[:at] + piece + data[at + len(piece) :]


def move(data, draw):
    a, b = sorted(draw.randrange(len(data)) for _ in range(2))
    return data[:a] + data[b:] + data[a:b]


def lengthen_header(data, draw):
    size = draw.choice([0, 1, len(data), len(data) + 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
    return size.to_bytes(8, "little") + data[8:]


def swap_digits(data, draw):
    """Another number somewhere in the text: a size, an offset, a lambda."""
    digits = [i for i, byte in enumerate(data[:4000]) if chr(byte).isdigit()]
    at = draw.choice(digits)
    return data[:at] + str(draw.randrange(10)).encode() + data[at + 1 :]


MUTATIONS = [flip, cut, grow, insert, remove, overwrite, move, swap_digits]


def changed_json(data, draw):
    """Valid JSON with another value somewhere."""
    found = json.loads(data)
    place = found
    while isinstance(place, (dict, list)) and place:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.3:
            values = [
                None,
                True,
                -1,
                0,
                10**30,
                1e300,
                "",
                "../../x",
                [],
                {},
                [[]],
                {"a": 1},
                "nan",
            ]
            place[key] = draw.choice(values)
            break
        place = inner
    return json.dumps(found).encode()


def mutated(folder, place, draw, config=CONFIG):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    name = draw.choice([WEIGHTS, config])
    kinds = [*MUTATIONS, lengthen_header if name == WEIGHTS else changed_json]
    data = (place / name).read_bytes()
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        change = draw.choice(kinds)
        with contextlib.suppress(ValueError, IndexError):  # nothing left to change
            data = change(data, draw)
    (place / name).write_bytes(data)


@pytest.mark.parametrize("patched", [False, True])
def test_a_mutated_folder_is_refused_or_loads_equal_values(tmp_path, patched, monkeypatch):
    saved = trained("dora", train=["head"])
    tokengate.save(saved, tmp_path / "saved")
    wanted, options = values(saved), {"method": "dora", "train": ["head"]}
    monkeypatch.setattr("builtins.eval", None)
    monkeypatch.setattr("pickle.loads", None)
    draw = random.Random(int(patched))
    outcomes = {"refused": 0, "equal": 0}
    base = tokengate.patch(fresh(), ["q_proj", "fc1"], **options) if patched else fresh()
    before = values(base)
    for _ in range(COUNT // 2):
        mutated(tmp_path / "saved", tmp_path / "mutated", draw)
        try:
            tokengate.load(base, tmp_path / "mutated", strict=draw.random() < 0.5)
        except TokenGateError as error:
            outcomes["refused"] += "\n" not in str(error)
            untouched = same(values(base), before)
            assert untouched
        else:
            outcomes["equal"] += 1
            assert same(values(base), wanted)
            assert {n: g.gate.penalty for n, g in tokengate.layers(base).items()} == {
                n: g.gate.penalty for n, g in tokengate.layers(saved).items()
            }
            with torch.no_grad():
                if patched:
                    base.load_state_dict(before)
                else:
                    tokengate.unpatch(base).load_state_dict(before)
    assert outcomes["refused"] > COUNT // 4
    assert sum(outcomes.values()) == COUNT // 2


def test_a_mutated_folder_of_peft_is_refused_or_loads_numbers(tmp_path):
    """Nothing says what was saved, so that other values may come, but of the shapes that fit."""
    peft(
        tmp_path / "saved",
        {"rank_pattern": {"^blocks.0.fc1": 2}, "alpha_pattern": {"fc.": 3}, "modules_to_save": None,
         "exclude_modules": ".*q_proj", "layers_to_transform": [0], "layers_pattern": ["blocks"]},
    )  # fmt: skip
    import_peft(Net(), tmp_path / "saved")
    draw, outcomes = random.Random(2), {"refused": 0, "loaded": 0}
    for _ in range(COUNT // 2):
        mutated(tmp_path / "saved", tmp_path / "mutated", draw, PEFT_CONFIG)
        model, began = Net(), time.process_time()
        try:
            import_peft(model, tmp_path / "mutated", strict=draw.random() < 0.5)
        except TokenGateError as error:
            outcomes["refused"] += str(error).isprintable()
            assert not tokengate.layers(model)
        else:
            outcomes["loaded"] += 1
            assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
        assert time.process_time() - began < 2
    assert min(outcomes.values()) > COUNT // 40, outcomes
    assert sum(outcomes.values()) == COUNT // 2


# In a process of its own, whose memory nothing else has grown before.
MEASURED = """
import pathlib, re, sys, torch, tokengate
model = torch.nn.Sequential(torch.nn.Linear(2048, 2048, bias=False))
tokengate.load(torch.nn.Sequential(torch.nn.Linear(64, 64)), sys.argv[1])
status = pathlib.Path("/proc/self/status")
kib = lambda key: int(re.search(key + r":\\s+(\\d+)", status.read_text())[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kib("VmRSS")
try:
    tokengate.load(model, sys.argv[2])
except tokengate.TokenGateError as error:
    assert "not finite" in str(error), error
print((kib("VmHWM") - before) << 10)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="asks Linux")
@pytest.mark.parametrize("damaged", [False, True])
def test_loading_needs_at_most_twice_the_memory_of_the_file(tmp_path, damaged):
    small = tokengate.patch(torch.nn.Sequential(torch.nn.Linear(64, 64)), ["0"])
    tokengate.save(small, tmp_path / "small")
    large = torch.nn.Sequential(torch.nn.Linear(2048, 2048, bias=False))
    tokengate.save(tokengate.patch(large, ["0"], rank=2048), tmp_path / "large")
    path = tmp_path / "large" / WEIGHTS
    size = path.stat().st_size
    assert size > 32 << 20
    if damaged:
        with open(path, "r+b") as file:
            file.seek(size - 4)
            file.write(b"\0\0\xc0\x7f")  # the last value is NaN: found only when all is read
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "small"), str(tmp_path / "large")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert size // 2 < grown <= 2 * size
