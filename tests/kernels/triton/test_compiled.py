"""The interpreter takes what a compiler refuses: each kernel is compiled, without a GPU."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not made for this platform")

KERNELS = [
    "_decide", "_direct", "_finish", "_measure", "_measure_rows", "_pass_gain", "_scale",
    "_scale_rows", "_sum", "_thin", "_unscale", "_unscale_rows", "_weigh",
]  # fmt: skip


def test_every_kernel_compiles():
    script = pathlib.Path(__file__).parent / "compiled.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [line.split()[0] for line in ran.stdout.splitlines()] == KERNELS
