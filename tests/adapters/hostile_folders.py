"""Folders that a stranger may have made, each with what is wrong with it.

As a program it reads all in a folder, and says what each was answered, how long that took and by
how much the process grew: one that is begun anew, in which nothing has grown before.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import socket
import sys
import time

import torch
from models import Net
from safetensors.torch import load_file, save_file

import tokengate
from tokengate.command_line import main
from tokengate.integrations.hf_peft import import_peft

WEIGHTS, CONFIG = "adapter_model.safetensors", "tokengate_config.json"
PEFT_CONFIG = "adapter_config.json"
LAYER, PLACE = "blocks.0.fc1", "base_model.model.blocks.0.fc1."


def raw(header, data=b"", length=None):
    """A file of safetensors, whatever its header says; of a dict or of bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2, 8), begin=0, size=None):
    """An entry of a header, and its values."""
    size = 4 * torch.Size(shape).numel() if size is None else size
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}


def peft(folder, config=(), tensors=None, weights=None):
    """An adapter of one layer, as PEFT would write it, and what is different in it."""
    folder.mkdir()
    found = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc1"], "bias": "none",
    }  # fmt: skip
    (folder / PEFT_CONFIG).write_text(json.dumps(found | dict(config)))
    if weights is not None:
        (folder / WEIGHTS).write_bytes(weights)
        return
    values = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(16, 2)}
    save_file({PLACE + key: value for key, value in (tensors or values).items()}, folder / WEIGHTS)


def own(folder, change=None, **options):
    """One of ours, changed."""
    tokengate.save(tokengate.patch(Net(), ["fc1"], rank=2, **options), folder)
    if change is not None:
        change(folder)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def link(path, to):
    path.unlink()
    path.symlink_to(to)


def sparse(path, size):
    with open(path, "ab") as file:
        file.truncate(size)


def a_socket(path):
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def a_folder(path):
    path.unlink()
    path.mkdir()


def of_peft(**config):
    return lambda folder: peft(folder, config)


def long_named(**config):
    """Of a layer with a name on which a pattern may be tried in many ways."""

    def make(folder):
        peft(folder, config)
        values = load_file(folder / WEIGHTS)
        name = f"{'a' * 40}{'x' * 40}.fc1."
        values = {k.replace("blocks.0.fc1.", name): v for k, v in values.items()}
        save_file(values, folder / WEIGHTS)

    return make


def with_weights(header, data=b"", length=None):
    return lambda folder: peft(folder, weights=raw(header, data, length))


def of_ours(change):
    return lambda folder: own(folder, change)


def with_config(text):
    return of_ours(lambda folder: (folder / CONFIG).write_bytes(text))


def as_dtype(dtype, size):
    """Values of one byte or so each, under the right names and in the right shapes."""
    a, b = (int(count * size) for count in (16, 32))
    header = {
        f"{PLACE}lora_A.weight": tensor(dtype, (2, 8), 0, a),
        f"{PLACE}lora_B.weight": tensor(dtype, (16, 2), a, b),
    }
    return with_weights(header, bytes(a + b))


def adalora(mask, outs=16, ins=8):
    def make(folder):
        kept = sum(mask)
        values = {
            "lora_A": torch.ones(kept, ins), "lora_B": torch.ones(outs, kept),
            "lora_E": torch.ones(kept, 1),
        }  # fmt: skip
        config = {"peft_type": "ADALORA", "init_r": len(mask), "target_r": 1}
        peft(folder, config | {"rank_pattern": {f"{LAYER}.lora_E": mask}}, values)

    return make


_OTHERS = {
    "F8_E4M3": 1, "F8_E5M2": 1, "F4": 0.5, "U16": 2, "U32": 4, "U64": 8, "C64": 8, "I8": 1,
    "I16": 2, "I32": 4, "I64": 8, "U8": 1, "BOOL": 1, "F128": 16, "": 1,
}  # fmt: skip
_PATTERNS = ("(a+)+$", "a*(x+x+)+y", ".*.*.*.*.*.*!", "(.*)*z", "(a|aa|x|xx|.)*!")
A = {f"{PLACE}lora_A.weight": tensor()}
KINDS = {
    # What is no regular file, or has no end.
    **{
        f"{kind} for {name}": of_ours(lambda folder, name=name, make=make: make(folder / name))
        for name in (CONFIG, WEIGHTS)
        for kind, make in {
            "a pipe": pipe,
            "a device": lambda path: link(path, "/dev/zero"),
            "a socket": a_socket,
            "a folder": a_folder,
            "a circle": lambda path: link(path, path.name),
            "20 GB without values": lambda path: sparse(path, 20 << 30),
            "nothing": lambda path: path.write_bytes(b""),
        }.items()
    },
    # JSON.
    "nested deeply": with_config(b'{"a":' * 100_000),
    "lists nested deeply": with_config(b"[" * 1_000_000),
    "empty lists": with_config(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
    "zeros": with_config(b'{"a":[' + b"0," * 4_000_000 + b"0]}"),
    "a whole number of a million digits": with_config(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "infinite in a list": with_config(b'{"a":[1e999]}'),
    "a key twice": with_config(b'{"a":1,"a":2}'),
    "half a pair": with_config(b'{"a\\ud800":1}'),
    "no UTF-8": with_config(b"\xff\xfe{}"),
    "no character": with_config(b"\0" * 1_000_000),
    # Headers.
    "a header of 2^63 bytes": with_weights(b"{}", length=1 << 63),
    "a header longer than the file": with_weights(b"{}", length=50_000_000),
    "a header that is a list": with_weights(b"[]"),
    "an entry that is a number": with_weights({PLACE: 3}),
    "no offsets": with_weights({PLACE: {"dtype": "F32", "shape": []}}),
    "offsets backwards": with_weights({PLACE: tensor(size=-4)}, b"1234"),
    "offsets beyond the file": with_weights(A),
    "a gap": with_weights({PLACE + "lora_A.weight": tensor(begin=8)}, bytes(72)),
    "values behind the last": with_weights(A, bytes(100)),
    "one place for two": with_weights(A | {f"{PLACE}lora_B.weight": tensor()}, bytes(64)),
    "a negative size": with_weights({PLACE: tensor(shape=(-1, -1), size=4)}, bytes(4)),
    "more elements than 64 bits": with_weights(
        {PLACE: tensor(shape=(1 << 40, 1 << 40, 0), size=0)}
    ),
    "metadata that are numbers": with_weights({"__metadata__": {"a": 1}} | A, bytes(64)),
    "a name of a megabyte": with_weights({PLACE + "x" * 1_000_000: tensor()}, bytes(64)),
    "a name of dots": with_weights({PLACE + "." * 100_000: tensor()}, bytes(64)),
    **{f"values of {dtype}": as_dtype(dtype, size) for dtype, size in _OTHERS.items()},
    # Patterns.
    **{
        f"{where} {pattern}": long_named(**{where: value})
        for pattern in _PATTERNS
        for where, value in {
            "target_modules": pattern,
            "exclude_modules": f"{pattern}|.*fc1",
            "rank_pattern": {pattern: 3, "fc1": 9},
            "alpha_pattern": {pattern: 3, "fc1": "x"},
        }.items()
    },
    "layers_pattern": long_named(layers_pattern="(a+)+b", layers_to_transform=[7]),
    "modules_to_save": long_named(modules_to_save=["(a|aa|.)*(a|aa|.)*!", ".*fc1"]),
    "names for a pattern": of_peft(target_modules=" (a+)+$", modules_to_save=["(a+)+$"]),
    "many patterns": of_peft(rank_pattern={f"(a*)*b{i}.*{i}": 1 for i in range(50_000)}),
    "many names": of_peft(target_modules=[f"x{i}" for i in range(300_000)]),
    "a million alternatives": of_peft(target_modules="|".join(f"x{i}" for i in range(150_000))),
    "repeats of repeats": of_peft(target_modules="((((a{1000}){1000}){1000}){1000})"),
    "repeats of nothing": of_peft(target_modules="((((){1000}){1000}){1000}){1000}"),
    "brackets": of_peft(target_modules="(" * 100_000),
    "a reference": of_peft(target_modules=r"(.*)\1fc1"),
    "alternatives taken apart": of_peft(layers_pattern="a|b", layers_to_transform=[0]),
    # Numbers.
    "rank 10^18": of_peft(r=10**18),
    "rank 10^30": of_peft(r=10**30),
    "alpha 1e300": of_peft(lora_alpha=1e300),
    "a mask of a million rows": adalora([True] + [False] * 999_999),
    "a mask of a layer of a billion": adalora([False] * 12, 10**9, 0),
}


def answers(folder):
    """What each way to read it says: a sentence, or None where the folder was taken."""
    said = []
    for read in (tokengate.load, import_peft):
        try:
            read(Net(), folder)
            said.append(None)
        except (tokengate.TokenGateError, OSError) as error:
            said.append(str(error))
    with contextlib.redirect_stderr(io.StringIO()) as err:
        said.append(err.getvalue() if main(["inspect", str(folder)]) == 2 else None)
    return said


def measured(folder):
    """The same, in how many seconds of the CPU, and by how many bytes the process grew."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = _bytes("VmRSS"), time.process_time()
    said = answers(folder)
    return said, time.process_time() - began, _bytes("VmHWM") - before


def _bytes(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) << 10


if __name__ == "__main__":
    for each in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        print(json.dumps([each.name, *measured(each)]), flush=True)
