"""Where kernels are taken, and where PyTorch's operations take their place."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from tokengate.errors import KernelsWarning
from tokengate.kernels import fused


@pytest.fixture
def found(monkeypatch):
    """What is found on a GPU of that capability, whose kernels measure so."""

    def asked(capability, measure):
        kernels = SimpleNamespace(measure=measure)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(importlib, "import_module", lambda name: kernels)
        return fused._of_gpu.__wrapped__(torch.device("cpu")), kernels

    return asked


def test_a_gpu_that_compiles(found):
    seen = []
    result, kernels = found((8, 0), lambda *tensors: seen.append(tensors))
    assert result is kernels
    assert len(seen) == 1
    assert found((7, 5), seen.append)[0] is None
    assert len(seen) == 1


def measure(*tensors):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")


def test_what_fails_in_a_graph_is_tried_again(found, monkeypatch):
    monkeypatch.setattr(fused, "is_captured", lambda: True)
    with pytest.raises(RuntimeError):
        found((9, 0), measure)


def test_a_machine_without_a_compiler(found):
    with pytest.warns(KernelsWarning) as warned:
        assert found((9, 0), measure)[0] is None
    [text] = [str(each.message) for each in warned]
    assert "\n" not in text
    assert text.endswith(".")
    for word in ("Triton", "cpu", "RuntimeError", "C compiler", "PyTorch's own operations"):
        assert word in text, text
