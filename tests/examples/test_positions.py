"""The examples of gates and regions, run as they are but shorter."""

import importlib
import sys

import pytest
import torch
from places import EXAMPLES

import tokengate
from tokengate.gates import registry

for needed in ("sklearn", "matplotlib", "tqdm", "transformers"):
    pytest.importorskip(needed, reason="the examples extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run an example with these arguments; its module, and what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(registry.GATES, "kinds", dict(registry.GATES.kinds))

    def main(name, *arguments):
        for each in (name, "custom_method"):
            sys.modules.pop(each, None)
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        if name == "custom_gate":
            import custom_method

            monkeypatch.setattr(custom_method, "trange", lambda steps, desc: range(3))
        module.main()
        return module, capsys.readouterr().out

    yield main
    for name in ("custom_gate", "custom_method", "shared_prefix", "regional_adapter"):
        sys.modules.pop(name, None)


def test_a_gate_of_one_s_own(run, tmp_path):
    _, text = run("custom_gate", "--output", tmp_path)
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")] == [
        "| gate", "| none", "| threshold", "| sigmoid", "| places", "| random",
    ]  # fmt: skip
    assert "in a new copy" in text or "loaded into a new copy" in text
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_shared_prefix_says_the_same(run):
    few = ["--prefix", 24, "--suffix", 8, "--adapters", 2, "--width", 64, "--rounds", 1]
    module, text = run("shared_prefix", *few)
    assert "between the two ways" in text
    model, names = module.make_model(64, 2), ["adapter 0", "adapter 1"]
    ids = torch.randint(512, (1, 32), generator=torch.Generator().manual_seed(0))
    one, other = module.alone(model, names, ids, 24), module.shared(model, names, ids, 24)
    assert (one[names[0]] - one[names[1]]).abs().max() > 1e-3
    for name in names:
        # Products of other numbers of rows are rounded otherwise.
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_two_adapters_in_two_regions(run, tmp_path):
    module, text = run("regional_adapter", "--steps", 2, "--output", tmp_path)
    assert "two regions, one forward" in text
    assert (tmp_path / "regions.png").stat().st_size > 10_000
    assert module.pictures().shape[1:] == (32, 32)
    model = module.Painter()
    assert model(module.pictures()[:2]).shape == (2, 32, 32)
    assert len(tokengate.layers(tokengate.patch(model, "all-linear"))) == 14
