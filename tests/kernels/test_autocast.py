"""Backward within autocast: the gradients are those of a backward outside it."""

import itertools
import pathlib

import pytest
import torch
from models import away_from_initialisation
from torch import nn

import tokengate

METHODS = ["lora", "dora", "adalora", "adapter"]
GATES = ["threshold", "firm", "fisher", "sigmoid", "random", False]


class AsItsInput(nn.Linear):
    """As quantised layers do: computes in 16 bits and returns the dtype of its input."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def layer_of(kind, dtype, method, gate, x):
    torch.manual_seed(0)
    layer = kind(12, 10).to(torch.float32 if kind is nn.Linear else dtype)
    options = {"rank": 4} if gate == "fisher" else {}
    tokengate.patch(layer, "all-linear", method, rank=4, gate=gate, gate_options=options)
    away_from_initialisation(layer, 0.5)
    if gate in ("threshold", "firm"):
        tokengate.calibrate(layer, [(x.float(),)], sparsity=0.4)
    if gate == "fisher":
        layer.gate.count_in("_fed")
    return layer


def gradients(layer, x, dtype, within, factor):
    """Of the parameters, of x, and what a gate is fed."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype):
        loss = (factor * layer(x).float()).square().sum()
        if within:
            loss.backward()
    if not within:
        loss.backward()
    found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad}
    if layer.gate and hasattr(layer.gate, "Q"):
        found["fed"] = layer.gate._fed.clone()
    return found


@pytest.mark.parametrize("kind", [nn.Linear, AsItsInput], ids=["follows", "leaves"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_backward_within_autocast(method, gate, dtype, kind):
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(2))
    outside, within = (
        gradients(layer_of(kind, dtype, method, gate, x), x, dtype, inside, 1.0)
        for inside in (False, True)
    )
    assert len(outside) >= 3
    for name, exact in outside.items():
        assert exact.any()
        assert torch.equal(within[name], exact), name


@pytest.mark.parametrize("gate", ["threshold", "firm", False], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_region_within_autocast(method, gate):
    """There M(x) is multiplied out."""
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(2))
    inside = torch.arange(36).view(4, 9) % 3 > 0
    found = []
    for within in (False, True):
        layer = layer_of(AsItsInput, torch.float16, method, gate, x)
        with tokengate.use(layer, {"default": inside}):
            found.append(gradients(layer, x, torch.float16, within, 1.0))
    for name, exact in found[0].items():
        assert torch.equal(found[1][name], exact), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", ["firm", False], ids=str)
def test_gradients_beyond_what_float16_holds(method, gate):
    """Of a base that leaves autocast they are float32's."""
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(2))
    layer = layer_of(AsItsInput, torch.float16, method, gate, x)
    with torch.autocast("cpu", torch.float16):
        (3e4 * layer(x)).square().mean().backward()
    of_parameters = [p.grad for p in layer.parameters() if p.grad is not None]
    assert max(grad.abs().max() for grad in of_parameters) > 65504
    assert all(grad.isfinite().all() for grad in of_parameters)


@pytest.mark.parametrize("gate", ["threshold", "firm"])
def test_a_gradient_that_has_gradients_within_autocast(gate):
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(2))
    layer = layer_of(AsItsInput, torch.float16, "dora", gate, x)
    x.requires_grad_()
    firsts = []
    for within in (False, True):
        with torch.autocast("cpu", torch.float16):
            loss = layer(x).square().sum()
        with torch.autocast("cpu", torch.float16, enabled=within):
            (first,) = torch.autograd.grad(loss, layer.modification.B, create_graph=True)
        assert first.requires_grad
        firsts.append(first)
    assert torch.equal(firsts[1], firsts[0])


@pytest.mark.parametrize("gate", ["threshold", "firm"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_compiled_within_autocast(method, gate):
    """Its backward is compiled there, too."""
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(2))
    layer = layer_of(AsItsInput, torch.bfloat16, method, gate, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for module in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x).square().sum()
        loss.backward()
        found.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert len(found[0]) >= 2
    for eager, got in zip(*found, strict=True):
        torch.testing.assert_close(got, eager)


def test_every_backward_keeps_its_dtypes():
    found = []
    for path in pathlib.Path(tokengate.__file__).parent.rglob("*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        found += [
            (path.name, above)
            for above, line in itertools.pairwise(lines)
            if line.startswith("def backward(ctx")
        ]
    assert len(found) >= 10
    assert [name for name, above in found if above != "@in_own_dtypes"] == []
