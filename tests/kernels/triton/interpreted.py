"""Triton's kernels as its interpreter runs them, on CPU tensors."""

import functools
import importlib

import pytest

from tokengate.kernels import fused

# Older interpreters know no numpy of today; what older compilers make, test_compiled.py shows.
pytest.importorskip("triton", "3.8", reason="there is no Triton 3.8 for this platform or torch")


@functools.cache
def interpreted():
    """The package, whose kernels are the interpreter's whatever was imported before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("tokengate.kernels.triton")


@pytest.fixture
def kernels(monkeypatch):
    """What is asked of kernels is done by the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    module = interpreted()
    made = functools.cache(InterpretedFunction)
    # Triton's own functions were imported before, without that variable.
    monkeypatch.setattr(
        JITFunction, "__call__", lambda self, *args, **kwargs: made(self.fn)(*args, **kwargs)
    )
    monkeypatch.setattr(fused, "_on", lambda device: module)
    return module
