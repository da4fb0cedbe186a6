"""Where kernels are taken, and where PyTorch's operations take their place."""

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tokengate.errors import KernelsWarning
from tokengate.kernels import fused


@pytest.fixture
def found(monkeypatch):
    """What is found on a GPU where that is so, and whose kernels measure so."""

    def asked(measure, capability=(9, 0), hip=None, triton="there"):
        kernels = SimpleNamespace(measure=measure)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton)
        monkeypatch.setattr(importlib, "import_module", lambda name: kernels)
        return fused._of_gpu.__wrapped__(torch.device("cpu")), kernels

    return asked


def test_a_gpu_that_compiles(found):
    seen = []
    result, kernels = found(lambda *tensors: seen.append(tensors), (8, 0))
    assert result is kernels
    assert len(seen) == 1


@pytest.mark.parametrize(
    "where",
    [{"capability": (7, 5)}, {"hip": "6.4"}, {"triton": None}],
    ids=["before Ampere", "AMD's", "no Triton"],
)
def test_where_nothing_is_tried(where, found):
    assert found(measure, **where)[0] is None  # without a warning


def measure(*tensors):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")


def test_what_fails_in_a_graph_is_tried_again(found, monkeypatch):
    monkeypatch.setattr(fused, "is_captured", lambda: True)
    with pytest.raises(RuntimeError):
        found(measure)


def test_a_machine_without_a_compiler(found):
    with pytest.warns(KernelsWarning) as warned:
        assert found(measure)[0] is None
    [text] = [str(each.message) for each in warned]
    assert "\n" not in text
    assert text.endswith(".")
    for word in ("Triton", "cpu", "RuntimeError", "C compiler", "PyTorch's own operations"):
        assert word in text, text


def test_memory_that_is_full_is_not_for_good(found):
    def full(*tensors):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        found(full)
