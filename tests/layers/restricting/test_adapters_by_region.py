"""use of several adapters, each at its own positions."""

import pytest
import torch
from models import away_from_initialisation, one_sentence
from restricted import MASK, net
from torch.utils.checkpoint import checkpoint

import tokengate

pytestmark = pytest.mark.usefixtures("one_thread")


def regional(tmp_path, gate="threshold", method="lora"):
    """A model with the adapters "a" and "b", and what each of them alone computes in a layer."""
    model = net(gate, method)
    for name in ("a", "b"):
        away_from_initialisation(model, 0.3 if name == "a" else 0.6)
        tokengate.save(model, tmp_path / name)
    for name in ("a", "b"):
        tokengate.load(model, tmp_path / name, name=name)
    return model


@pytest.mark.parametrize("method", ["lora", "dora", "adapter"])
@pytest.mark.parametrize("gate", ["threshold", False])
def test_two_adapters_each_at_its_own_positions(tmp_path, gate, method):
    model, x = regional(tmp_path, gate, method), torch.randn(2, 5, 8)
    layer = model.blocks[0].fc1
    other = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    with tokengate.disabled(model):
        base = layer(x)
    alone = {}
    for name in ("a", "b"):
        with tokengate.use(model, name):
            alone[name] = layer(x)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    with tokengate.use(model, {"a": MASK, "b": other}), tokengate.record(model) as rec:
        h = layer(x)
    assert torch.equal(h[~MASK & ~other], base[~MASK & ~other])
    for name, where in (("a", MASK & ~other), ("b", other & ~MASK)):
        torch.testing.assert_close(h[where], alone[name][where])
    both = MASK & other
    assert both.any()
    torch.testing.assert_close(h[both], (alone["a"] + alone["b"] - base)[both])
    assert rec.report().modules["blocks.0.fc1"].positions == 10
    with tokengate.use(model, {"a": MASK, "b": other}), tokengate.restrict(model, other):
        h = layer(x)
    assert torch.equal(h[~other], base[~other])
    torch.testing.assert_close(h[both], (alone["a"] + alone["b"] - base)[both])


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_regions_are_trained_through(tmp_path, reentrant):
    model, x = regional(tmp_path), torch.randn(2, 5, 8, requires_grad=True)
    with tokengate.use(model, {"a": MASK, "b": ~MASK}):
        h = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        h.square().sum().backward()
    found = x.grad.clone()
    x.grad = None
    with tokengate.use(model, {"a": MASK, "b": ~MASK}):
        model(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    x.grad = None
    with tokengate.use(model, "a"):
        model(x).square().sum().backward()
    assert (found - x.grad).abs().max() > 1e-3


def test_what_is_no_region_of_an_adapter_is_refused(tmp_path):
    model, x = regional(tmp_path), torch.randn(2, 5, 8)
    for wrong, words in (
        ({"c": MASK}, "'c'"), ({"a": 3}, "use was given 3"), ({}, "no names"),
        ({"a": torch.full((2, 5), 2.0)}, "outside [0, 1]"),
    ):  # fmt: skip
        with one_sentence(words):
            tokengate.use(model, wrong)
    with tokengate.use(model, {"a": MASK[:, :4]}), one_sentence("(2, 4)", "(2, 5)", "q_proj"):
        model(x)
