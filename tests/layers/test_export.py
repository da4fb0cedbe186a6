"""What is exported (torch.export, ONNX, torch.jit.trace) gives eager mode's numbers."""

import io
import itertools
import logging

import pytest
import torch
from models import Net
from torch import nn
from torch._subclasses import FakeTensor
from torch.export import Dim

import tokengate
from tokengate import TokenGateError
from tokengate.layers import calls

METHODS = ["lora", "dora", "adalora", "adapter"]
# Of torch itself, and of the exporters' own libraries.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "torch.jit.TracerWarning")
]
# Strict export says so of what is undone at the end of each call.
SIDE = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
BOTH = ({0: Dim("batch"), 1: Dim("time")},)


@pytest.fixture(autouse=True)
def _no_trace():
    """torch writes every graph to its own trace log, as soon as anybody listens."""
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


class Every(nn.Module):
    """`(B, T, 16) -> (B, T, n 12)`: every method, every gate, slices and a transposed layer."""

    def __init__(self):
        super().__init__()
        names = [*METHODS, "sigmoid", "random", "ungated", "sliced"]
        for name in names:
            self.add_module(name, nn.Linear(16, 12, bias=name != "lora"))
        from transformers.pytorch_utils import Conv1D

        self.transposed = Conv1D(12, 16)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], -1)


def away(model):
    """Its modifications as after a training, and evaluated."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            for name, parameter in layer.modification.named_parameters():
                if name in ("B", "E", "U"):
                    nn.init.normal_(parameter, std=0.5)
                elif name == "magnitude":
                    parameter *= 1 + 0.3 * torch.rand_like(parameter)
    return model.eval()


def every(dtype=torch.float32):
    """Each trained and, where it has a tau, closed at half of the positions."""
    torch.manual_seed(0)
    model = Every().to(dtype)
    tokengate.patch(model, ["sigmoid", "random"], gate={"sigmoid": "sigmoid", "random": "random"})
    tokengate.patch(model, ["ungated"], gate=False)
    for method in METHODS:
        tokengate.patch(model, [method], method)
    sizes = {"sliced": tokengate.Slices(q=4, k=4, v=4)}
    tokengate.patch(model, ["sliced.q", "sliced.v", "transposed"], slices=sizes)
    away(model)
    nn.init.normal_(model.sigmoid.gate.v)
    tokengate.calibrate(model, [batch(0, dtype)], sparsity=0.5)
    return model


def batch(seed, dtype=torch.float32, shape=(4, 7)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 16, generator=generator).to(dtype)


def in_onnxruntime(model, x, shapes=None):
    """The exported model as a function."""
    runtime = pytest.importorskip("onnxruntime", reason="the test extra is not installed")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=shapes)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def by_layer(model, h):
    """`(B, T, n, 12)`."""
    return h.detach().unflatten(-1, (-1, 12))


def check(model, run, x, tolerance):
    """What was exported is what the model computes, of positions open and closed."""
    with tokengate.disabled(model):
        base = by_layer(model, model(x))
    with tokengate.record(model) as rec:
        wanted = by_layer(model, model(x))
    modified = (wanted != base).any(-1)
    for i, (name, _) in enumerate(model.named_children()):
        share = modified[..., i].float().mean()
        assert (share == 1) if name == "ungated" else (0 < share < 1), name
    assert 0 < rec.report().token_sparsity < 1
    got = by_layer(model, run(x))
    assert torch.equal((got - base).abs().amax(-1) > 0.01, (wanted - base).abs().amax(-1) > 0.01)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 1e-2)],
)
def test_onnx_of_any_batch(dtype, tolerance):
    model = every(dtype)
    run = in_onnxruntime(model, batch(0, dtype), BOTH)
    # The gates open elsewhere than for what it was exported with.
    for seed, shape in [(0, (4, 7)), (1, (4, 7)), (2, (5, 3))]:
        check(model, run, batch(seed, dtype, shape), tolerance)


@SIDE
# An older compiler traces no context variable.
@pytest.mark.parametrize("strict", [False, True], ids=["in steps", "whole_graph"])
def test_torch_export(strict):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    away(tokengate.patch(model, "all-linear", "dora"))
    tokengate.calibrate(model, [batch(0)], sparsity=0.5)
    program = torch.export.export(model, (batch(0),), dynamic_shapes=BOTH, strict=strict)
    check(model, program.module(), batch(2, shape=(5, 3)), 1e-6)


def test_a_traced_model_is_saved_and_loaded():
    model = every()
    traced, file = torch.jit.trace(model, (batch(0),)), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for seed, shape in [(0, (4, 7)), (1, (4, 7)), (2, (5, 3))]:
        check(model, loaded, batch(seed, shape=shape), 1e-6)


def test_onnx_where_squares_leave_the_range_of_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    away(tokengate.patch(model, "all-linear", "dora"))
    tokengate.calibrate(model, [batch(0)], sparsity=0.5)
    run = in_onnxruntime(model, batch(0))
    for size in (1e-34, 1e-24, 1.0, 1e24, 1e30):
        x = batch(0) * size
        with tokengate.disabled(model):
            base = model(x)
        wanted = model(x)
        assert 0.4 < (wanted != base).any(-1).float().mean() < 0.6
        torch.testing.assert_close(run(x) / size, wanted.detach() / size, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["export", "trace"])
def test_gradients_of_what_was_exported_reach_all_but_tau(way):
    """A graph has no backward of its own: autograd's through the products is right for the rest."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 9)), batch(0).requires_grad_()
    tokengate.patch(model, ["0"], "dora")
    away(tokengate.patch(model, ["1"], "adapter", activation="gelu"))
    tokengate.calibrate(model, [batch(0)], sparsity=0.5)
    model(x).square().sum().backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    wanted_x, x.grad = x.grad, None
    model.zero_grad()
    example = (batch(0),)
    if way == "export":
        run = torch.export.export(model, example).module()
    else:
        run = torch.jit.trace(model, example)
    run(x).square().sum().backward()
    got = {n: p.grad for n, p in run.named_parameters() if p.grad is not None}
    taus = {n for n in wanted if n.endswith("tau")}
    assert len(taus) == 2
    assert set(got) == set(wanted) - taus
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(x.grad, wanted_x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [torch.export.export, torch.jit.trace])
def test_a_gate_that_learns_is_not_exported(way):
    model = tokengate.patch(nn.Sequential(nn.Linear(16, 4)), "all-linear")
    with pytest.raises(TokenGateError, match=r"TokenGate in training mode.*model\.eval\(\)"):
        way(model, (batch(0),))
    way(model.eval(), (batch(0),))
    ungated = tokengate.patch(nn.Sequential(nn.Linear(16, 4)), "all-linear", gate=False)
    way(ungated, (batch(0),))


@pytest.mark.parametrize("way", [torch.export.export, torch.jit.trace])
def test_an_export_is_not_recorded(way):
    model = tokengate.patch(nn.Sequential(nn.Linear(16, 4)), "all-linear").eval()
    with (
        tokengate.record(model) as rec,
        pytest.raises(TokenGateError, match=r"within tokengate\.record"),
    ):
        way(model, (batch(0),))
    with pytest.raises(TokenGateError, match="nothing was recorded"):
        rec.report()


def test_a_model_is_after_its_export_what_it_was():
    """No value of a graph stays in it."""
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 9), nn.Linear(9, 12))
    for name, method in enumerate(["dora", "lora", "adalora"]):  # untrained: a DoRA follows W0
        tokengate.patch(model, [str(name)], method, gate="random" if name else "threshold")
    model.eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    wanted = model(batch(1))
    torch.export.export(model, (batch(0),), dynamic_shapes=BOTH)
    held = [v for m in model.modules() for v in vars(m).values()]
    held += [v for one in held if isinstance(one, dict) for v in one.values()]
    assert not [v for v in held if isinstance(v, FakeTensor)]
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(model(batch(1)), wanted)


class Words(nn.Module):
    """(B, T) -> (B, T, 8)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, input_ids, attention_mask=None):
        return self.v_proj(torch.tanh(self.q_proj(self.embed(input_ids))))


@pytest.fixture
def words(tmp_path):
    """With two adapters, of which "b" changes other positions."""
    torch.manual_seed(0)
    model = away(tokengate.patch(Words(), "all-linear"))
    tokengate.calibrate(model, [ids(0)], sparsity=0.5)
    tokengate.save(model, tmp_path)
    tokengate.load(model, tmp_path, name="b")
    for layer in tokengate.layers(model).values():
        layer.adapter("b")[0].B.data.mul_(-2)
    return model


def ids(seed, shape=(4, 7)):
    found = torch.randint(6, 20, shape, generator=torch.Generator().manual_seed(seed))
    found[:, seed + 1] = 5
    return found


MASK = torch.arange(28).view(4, 7) % 3 == 0
# What is in force, and which sizes may then vary.
CONTEXTS = {
    "disabled": (tokengate.disabled, (0, 1)),
    "use": (lambda m: tokengate.use(m, "b"), (0, 1)),
    "rows": (lambda m: tokengate.use(m, ["b", None, "default", "b"]), (1,)),
    "regions": (lambda m: tokengate.use(m, {"default": MASK, "b": ~MASK}), ()),
    "mask": (lambda m: tokengate.restrict(m, MASK), ()),
    "weights": (lambda m: tokengate.restrict(m, MASK * 0.5), ()),
    "function": (lambda m: tokengate.restrict(m, later), (0, 1)),
    "after": (lambda m: tokengate.restrict(m, tokengate.after([5])), (0, 1)),
}


def later(name, shape):
    return torch.arange(shape[1]).expand(shape) >= 3


@pytest.mark.parametrize(
    ("context", "way"),
    [
        *itertools.product(CONTEXTS, ["trace"]),
        *itertools.product(["disabled", "rows", "weights", "function", "after"], ["export"]),
        ("after", "onnx"),
    ],
)
def test_what_is_in_force_is_exported(words, context, way):
    enter, free = CONTEXTS[context]
    with enter(words):
        wanted = {seed: words(ids(seed)) for seed in (0, 1, 2)}
    sizes = {each: Dim(("batch", "time")[each]) for each in free}
    with enter(words):
        if way == "export":
            run = torch.export.export(words, (ids(0),), dynamic_shapes=(sizes,)).module()
        elif way == "trace":
            run = torch.jit.trace(words, (ids(0),))
        else:
            run = in_onnxruntime(words, ids(0), (sizes,))
        assert torch.equal(words(ids(0)), wanted[0])
    for seed, h in wanted.items():
        assert (words(ids(seed)) - h).abs().max() > 1e-3
        torch.testing.assert_close(run(ids(seed)), h, rtol=1e-5, atol=1e-5)
    if way == "export" and free:
        shape = [(6 if 0 in free else 4), (9 if 1 in free else 7)]
        with enter(words):
            other = words(ids(3, shape))
        torch.testing.assert_close(run(ids(3, shape)), other, rtol=1e-5, atol=1e-5)


def test_an_export_that_fails_leaves_nothing_running():
    model = tokengate.patch(Net(), "all-linear", rank=2)
    with pytest.raises(TokenGateError, match="in training mode"):
        torch.export.export(model, (torch.randn(2, 5, 8),), strict=False)
    assert not calls.running()
