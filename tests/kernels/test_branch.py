"""The layer's input, whose gradient through M is added in place to that through W0."""

import pytest
import torch
from allocations import allocations_of
from models import Keeps, away_from_initialisation
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokengate
from tokengate.kernels import dropped_linear
from tokengate.methods import base

METHODS = ["lora", "dora", "adalora", "adapter"]


@pytest.fixture(autouse=True)
def branches(monkeypatch):
    """How often an input is branched; with small ones it would be never."""
    calls = []
    apply = dropped_linear._Branched.apply
    monkeypatch.setattr(base, "_LARGE", 40)
    monkeypatch.setattr(
        dropped_linear._Branched, "apply", lambda *args: calls.append(args) or apply(*args)
    )
    return calls


def layer_of(method="lora", kind=nn.Linear, **options):
    torch.manual_seed(0)
    layer = tokengate.patch(kind(12, 10), "all-linear", method, rank=4, tau=0.5, **options)
    return away_from_initialisation(layer)


def gradients(layer, x, loss=lambda x, h: h.square().sum()):
    """Of x and all parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)  # of dropout
    loss(x, layer(x)).backward()
    return [x.grad, *[p.grad.clone() for p in layer.parameters() if p.grad is not None]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5], ids=["plain", "listed", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_two_users_of_x(method, dropout, dtype, branches, monkeypatch):
    layer = layer_of(method, dropout=dropout).to(dtype)
    x = torch.randn(5, 7, 12).to(dtype)
    found = gradients(layer, x)
    assert len(branches) == 1
    monkeypatch.setattr(base, "_LARGE", x.numel() + 1)
    wanted = gradients(layer, x)
    assert len(branches) == 1
    with tokengate.disabled(layer):
        assert not torch.allclose(
            torch.autograd.grad(layer(y := x.requires_grad_()).square().sum(), y)[0], found[0]
        )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_other_users_of_x_keep_their_gradients(method, branches, monkeypatch):
    layer, x, seen = layer_of(method), torch.randn(5, 12), []

    def loss(x, h):
        y = x * 2
        y.retain_grad()
        y.register_hook(seen.append)
        return ((h + layer(y)).sum(-1) * y.sum(-1)).sum() + x.square().sum()

    found, kept = gradients(layer, x, loss), seen.pop()
    assert len(branches) == 2
    monkeypatch.setattr(base, "_LARGE", x.numel() + 1)
    for one, other in zip([*found, kept], [*gradients(layer, x, loss), seen.pop()], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "listed"])
def test_one_gradient_of_x_s_size(dropout, branches, monkeypatch):
    layer = tokengate.patch(nn.Linear(2048, 16), "all-linear", rank=4, dropout=dropout)
    layer.modification.A.requires_grad_(False)  # its own takes a thinned copy of x
    leaf = torch.randn(4, 16, 2048, requires_grad=True)
    x = leaf * 1  # what a leaf is given may be copied
    h = layer(x)

    def step():
        torch.autograd.grad(h, x, torch.ones_like(h), retain_graph=True)

    assert sum(size >= x.nbytes for size in allocations_of(step)) == 1
    assert branches
    monkeypatch.setattr(base, "_LARGE", x.numel() + 1)
    h = layer(x)
    assert sum(size >= x.nbytes for size in allocations_of(step)) > 1


def test_each_gradient_can_be_asked_for_alone():
    layer, x = layer_of(), torch.randn(5, 12, requires_grad=True)
    every = dict(
        zip(["x", "A"], torch.autograd.grad(layer(x).sum(), [x, layer.modification.A]), strict=True)
    )
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], every["x"])
    assert torch.equal(torch.autograd.grad(layer(x).sum(), layer.modification.A)[0], every["A"])
    layer.modification.A.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], every["x"])


@pytest.mark.parametrize(
    "case",
    [
        "small",
        "constant",
        "no_grad",
        "autocast",
        "mixed dtypes",
        "other class",
        "off",
        "forward",
        "rows",
    ],
)
def test_where_it_is_not_done(case, branches):
    class Plain(tokengate.methods.LoRA):
        def forward(self, x, w):
            return tokengate.methods.LoRA.factors(self, x, w, None).product(w)

    kind = Keeps if case == "other class" else nn.Linear
    layer = layer_of(Plain if case == "forward" else "lora", kind)
    x = torch.randn(5, 12, requires_grad=True)
    layer(x)
    assert len(branches) == (case not in ("other class", "forward"))
    branches.clear()
    if case == "small":
        layer(x[:3])
    elif case == "constant":
        layer(x.detach())
    elif case == "no_grad":
        with torch.no_grad():
            layer(x)
    elif case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    elif case == "mixed dtypes":
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(x.double())
    elif case == "off":
        with tokengate.disabled(layer):
            layer(x)
    elif case == "rows":
        with tokengate.use(layer, ["default"] * 5):
            layer(x)
    assert not branches


def test_an_input_of_a_wrong_width_is_refused_by_the_base_layer():
    layer, x = layer_of(), torch.randn(5, 13, requires_grad=True)
    with pytest.raises(RuntimeError, match="5x13 and 12x10"):
        layer(x)


class Keeper(TorchDispatchMode):
    """Keeps what products gave, with a copy."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        if f is torch.ops.aten.mm.default:
            self.kept.append((result, result.clone()))
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5], ids=["plain", "listed", "mask"])
def test_a_gradient_that_a_dispatch_mode_may_keep_is_not_written_over(dropout):
    layer, x = layer_of(dropout=dropout), torch.randn(5, 12, requires_grad=True)
    h = layer(x)
    h.sum().backward(retain_graph=True)
    plain, x.grad = x.grad, None
    with Keeper() as keeper:
        h.sum().backward()
    assert keeper.kept
    assert all(torch.equal(one, copy) for one, copy in keeper.kept)
    torch.testing.assert_close(x.grad, plain)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5], ids=["plain", "listed", "mask"])
def test_a_pipeline_s_second_pass_for_the_weights_alone(dropout):
    """It keeps what the node was given in the pass for x, and gives it once more."""
    layer, x = layer_of(dropout=dropout), torch.randn(5, 12, requires_grad=True)
    torch.manual_seed(1)
    (layer(x) ** 2).sum().backward()
    wanted = [x.grad.clone(), layer.modification.A.grad.clone()]
    given = []
    torch.manual_seed(1)
    h = layer(x)
    node = next(n for n in nodes_of(h) if n.name() == "_BranchedBackward")
    hook = node.register_prehook(given.append)
    (found,) = torch.autograd.grad((h**2).sum(), x, retain_graph=True)
    hook.remove()
    layer.zero_grad()
    edges = [torch.autograd.graph.GradientEdge(node, i) for i in range(2)]
    torch.autograd.backward(edges, given[0], inputs=[layer.modification.A])
    torch.testing.assert_close([found, layer.modification.A.grad], wanted)


def nodes_of(h):
    left, seen = [h.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5], ids=["plain", "listed", "mask"])
def test_x_is_kept_for_what_learns_from_it_only(dropout, branches, monkeypatch):
    layer, x = layer_of(dropout=dropout), torch.randn(5, 12, requires_grad=True)

    def keeps_x():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            layer(x)
        return any(t.data_ptr() == x.data_ptr() for t in kept)

    for large in (base._LARGE, x.numel() + 1):
        monkeypatch.setattr(base, "_LARGE", large)
        layer.modification.A.requires_grad_(True)
        assert keeps_x()
        layer.modification.A.requires_grad_(False)
        assert not keeps_x()
    assert len(branches) == 2


def test_no_dropout_in_evaluation_with_gradients(branches):
    layer, x = layer_of(dropout=0.5), torch.randn(5, 12, requires_grad=True)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert len(branches) == 4


def test_a_transposed_input():
    layer, x = layer_of(), torch.randn(12, 5)
    for one, other in zip(gradients(layer, x.T), gradients(layer, x.T.contiguous()), strict=True):
        torch.testing.assert_close(one, other)


def test_transforms_and_compiled_code_go_their_own_way(branches):
    layer, x = layer_of(), torch.randn(5, 12)

    def loss(x):
        return layer(x).square().sum()

    wanted = gradients(layer, x)[0]
    assert len(branches) == 1
    torch.testing.assert_close(torch.func.grad(loss)(x), wanted)
    torch.compiler.reset()
    y = x.clone().requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(y).backward()
    torch.testing.assert_close(y.grad, wanted)
    assert len(branches) == 1


def test_nothing_is_written_over_that_has_gradients_of_its_own(monkeypatch):
    added = []
    monkeypatch.setattr(dropped_linear, "_add_grad_of_x", lambda *args: added.append(args))
    layer, x = layer_of(), torch.randn(5, 12, requires_grad=True)
    loss = layer(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    assert not added
    assert first.requires_grad
    torch.autograd.grad(loss, x)
    assert len(added) == 1
