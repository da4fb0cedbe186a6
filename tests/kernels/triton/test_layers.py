"""Layers whose calls kernels compute, against the loop over positions and PyTorch's operations."""

import pytest
import reference
import torch
from drawing import many
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import kernels
from models import away_from_initialisation
from torch import nn

import tokengate
from tokengate.kernels import Factors, fused, gated_sum
from tokengate.methods import base

__all__ = ["kernels"]

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    # Numbers that were scaled the wrong way are not selected.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
METHODS = ["lora", "dora", "adalora", "adapter"]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def layer_of(method, k, d, dtype=torch.float32, bias=False, **options):
    torch.manual_seed(0)
    layer = nn.Linear(k, d, bias=bias).to(dtype)
    tokengate.patch(layer, "all-linear", method, **options)
    away_from_initialisation(layer, 0.3)
    if method == "dora":
        with torch.no_grad():
            norms = layer.weight.float().norm(dim=1)
            layer.modification.magnitude.mul_(0.5).add_(norms)
    return layer


def close_some(layer, x):
    """A tau far from every position's r."""
    w = nn.functional.linear(x, layer.weight)
    factors = layer.modification.factors(x, w, layer)
    r = (factors.product(w).float().norm(dim=-1) / w.float().norm(dim=-1)).detach()
    r = r.flatten().clamp(min=1e-9).sort().values
    gaps = (r[1:] / r[:-1])[: max(1, len(r) - 1)]
    at = int(gaps.argmax())
    with torch.no_grad():
        layer.gate.tau.fill_(r[at : at + 2].mean())


def results(layer, x, grad):
    """The output, S and all gradients."""
    x = x.clone().requires_grad_()
    with tokengate.record(layer, positions=True) as rec:
        h = layer(x)
    h.backward(grad)
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return {"h": h.detach(), "S": rec.positions[""][0], "x": x.grad, **found}


def without_kernels(monkeypatch_context, layer, x, grad):
    with monkeypatch_context() as patch:
        patch.setattr(fused, "_on", lambda device: None)
        return results(layer, x, grad)


@pytest.mark.parametrize("method", METHODS)
@settings(
    max_examples=many(4),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_equals_pytorch_s_operations(method, data):
    draw = data.draw
    shape = draw(st.sampled_from([(7,), (2, 9), (1, 1), (3, 2, 4), (40,)]))
    k, d = draw(st.integers(2, 40)), draw(st.integers(2, 150))
    rank = draw(st.sampled_from([1, 3, 16, 17, 70]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    bias, gate = draw(st.booleans()), draw(st.booleans())
    layer = layer_of(method, k, d, dtype, bias, rank=rank, gate=gate)
    x, grad = torch.randn(*shape, k).to(dtype), torch.randn(*shape, d).to(dtype)
    if gate and x[..., 0].numel() > 1:
        close_some(layer, x)
    found = results(layer, x, grad)
    wanted = without_kernels(pytest.MonkeyPatch.context, layer, x, grad)
    assert found.keys() == wanted.keys()
    assert torch.equal(found.pop("S"), wanted.pop("S"))
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        size = value.abs().max().float().item() + 1e-3
        torch.testing.assert_close(
            found[name], value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


class Turned(nn.Linear):
    """Whose output has its positions side by side in memory, and not its channels."""

    def forward(self, input):
        return (self.weight @ input.mT).mT + self.bias


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_other_strides(method):
    torch.manual_seed(0)
    layer, x, grad = Turned(11, 21), torch.randn(6, 11), torch.randn(6, 21)
    assert layer(x).stride(1) > 1
    tokengate.patch(layer, "all-linear", method, rank=3)
    close_some(away_from_initialisation(layer, 0.3), x)
    found = results(layer, x, grad)
    wanted = without_kernels(pytest.MonkeyPatch.context, layer, x, grad)
    assert 0 < found["S"].sum() < 6
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5)


class OneGain(tokengate.Modification):
    """A method of one's own, of which one number is the gain of all channels."""

    def __init__(self, linear):
        super().__init__(linear)
        self.A = self.new_parameter(2, self.in_features)
        self.B = self.new_parameter(self.out_features, 2)
        self.g = self.new_parameter(1)

    def reset_parameters(self):
        for p in self.parameters():
            nn.init.zeros_(p)

    def factors(self, x, w, linear):
        return Factors(x @ self.A.T, self.B, self.g.expand(self.out_features))


def test_numbers_that_all_channels_share():
    layer = layer_of(OneGain, 11, 21, bias=True)
    layer.bias.data = torch.randn(1).expand(21)
    x, grad = torch.randn(6, 11), torch.randn(6, 21)
    close_some(layer, x)
    found = results(layer, x, grad)
    wanted = without_kernels(pytest.MonkeyPatch.context, layer, x, grad)
    assert 0 < found["S"].sum() < 6
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_loop(method):
    layer = layer_of(method, 11, 21, bias=True, rank=3, penalty=0.5)
    x, grad = torch.randn(2, 6, 11), torch.randn(2, 6, 21)
    close_some(layer, x)
    found = results(layer, x, grad)
    values = {n: p.detach().double().numpy() for n, p in layer.named_parameters()}
    own = {n.split(".")[1]: v for n, v in values.items() if n.startswith("modification.")}
    further = {"dora": {"W0": values["weight"]}, "adapter": {"activation": "relu"}}.get(method, {})

    def modify(x, w):
        scale = layer.modification.scale
        return getattr(reference, method)(x, w, own, scale, **further)

    wanted = reference.layer(
        x.reshape(-1, 11).double().numpy(), values["weight"], values["bias"], own, modify,
        layer.gate.tau.item(), 0.5, grad.reshape(-1, 21).double().numpy(),
    )  # fmt: skip
    assert found.pop("S").flatten().tolist() == wanted["S"]
    assert 0 < sum(wanted["S"]) < 12
    for name, value in found.items():
        exact = torch.from_numpy(wanted[name.split(".")[-1]]) if name != "gate.tau" else None
        exact = torch.tensor([wanted["tau"]]) if exact is None else exact.reshape(value.shape)
        torch.testing.assert_close(value.double(), exact.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_closed_position_is_the_base_bit_for_bit(method):
    layer = layer_of(method, 11, 21, rank=3, tau=1e6)
    x = torch.randn(5, 11)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))
        layer.gate.tau.zero_()
        assert not torch.equal(layer(x), nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e24, 1e30])
def test_squares_out_of_range(method, size):
    layer = layer_of(method, 12, 10, rank=4)
    x, grad = torch.randn(20, 12), torch.randn(20, 10)
    close_some(layer, x)
    wanted = results(layer, x, grad)["S"]
    assert 0 < wanted.float().mean() < 1
    assert torch.equal(results(layer, x * size, grad)["S"], wanted)


def test_nan_opens_and_zeros_divide_nothing():
    layer = layer_of("lora", 12, 10, rank=4, tau=1e6)
    x = torch.randn(5, 12)
    x[0], x[1], x[2] = torch.nan, 0, torch.inf
    assert results(layer, x, torch.ones(5, 10))["S"].tolist() == [True, True, True, False, False]
    assert layer(x)[0].isnan().all()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_no_gradient_passes_a_closed_position(method):
    layer = layer_of(method, 12, 10, rank=4, tau=1e6)
    x = torch.randn(3, 12)
    found = results(layer, x, torch.ones(3, 10))
    assert not found["S"].any()
    own = [value for name, value in found.items() if name.startswith("modification.")]
    assert own
    assert not any(value.any() for value in own)


def test_a_mask_and_a_controlled_penalty():
    model = nn.Sequential(nn.Linear(12, 10, bias=False))
    tokengate.patch(model, "all-linear", "lora", rank=4, penalty=0.3)
    gate = away_from_initialisation(model, 0.3)[0].gate
    tokengate.scale_penalty(model, 4.0)
    mu, a = torch.randn(2, 8), torch.rand(2, 8).round()
    mask = torch.tensor([[1] * 8, [1, 1, 0, 0, 0, 0, 0, 0]])
    from tokengate.gates.threshold import threshold_direction

    module = fused.kernels_for(mu)
    for each in (mask, mask.bool(), mask.float(), None):
        wanted = -threshold_direction(mu, a, gate.pull(), each)
        flat = None if each is None else each.flatten()
        pull = gate.pull()
        tensor = pull if isinstance(pull, torch.Tensor) else None
        number = 0.0 if tensor is not None else pull
        found = module.direct(mu.flatten(), a.flatten(), flat, tensor, number, torch.float32)
        torch.testing.assert_close(found, wanted.reshape(1))


def test_a_second_derivative_takes_the_traced_way():
    layer = layer_of("dora", 6, 5, rank=2)
    x = torch.randn(3, 6, requires_grad=True)

    def twice():
        h = layer(x)
        (first,) = torch.autograd.grad((h**2).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), [x, layer.modification.B])

    found = twice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_on", lambda device: None)
        for one, other in zip(found, twice(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("large", [0, 2**17], ids=["branched", "apart"])
def test_dropout_is_the_same_in_backward(large, monkeypatch):
    """Of a linear M the gradients follow from what forward dropped."""
    monkeypatch.setattr(base, "_LARGE", large)
    layer = layer_of("lora", 30, 10, rank=4, dropout=0.4, gate=False).train()
    x = torch.randn(9, 30, requires_grad=True)
    h = layer(x)
    grad = torch.randn(9, 10)
    h.backward(grad)
    m = layer.modification
    # <G, M(x)> is <dL/dA, A>, and what came through M of <dL/dx, x>.
    through = (h - nn.functional.linear(x, layer.weight)).detach()
    inner = (grad * through).sum()
    torch.testing.assert_close((m.A.grad * m.A).sum(), inner, rtol=1e-4, atol=1e-4)
    through_x = x.grad - grad @ layer.weight
    torch.testing.assert_close((through_x * x).sum(), inner, rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x), h)  # another call drops others
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    seed = torch.tensor(5)
    share = (fused.kernels_for(x).thin(torch.ones(40, 50), seed, 0.4) == 0).float().mean()
    assert abs(share - 0.4) < 0.05


def test_an_untrained_dora_follows_its_base():
    torch.manual_seed(0)
    layer = nn.Linear(12, 10, bias=False)
    tokengate.patch(layer, "all-linear", "dora", rank=2)
    x = torch.randn(4, 12)
    for training in (True, False):
        with torch.no_grad():
            layer.weight.mul_(3)
        with torch.set_grad_enabled(training):
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))
        norms = layer.weight.norm(dim=1)
        torch.testing.assert_close(layer.modification.magnitude.detach(), norms)
    with torch.no_grad():
        layer.modification.magnitude.mul_(1.5)
        layer.weight.mul_(2)
    before = layer.modification.magnitude.detach().clone()
    assert not torch.equal(layer(x), nn.functional.linear(x, layer.weight))
    assert torch.equal(layer.modification.magnitude, before)


def test_what_is_traced_sees_operations():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = layer_of("lora", 12, 10, rank=4).eval()
    x = torch.randn(3, 12)
    with torch.no_grad():
        graph = make_fx(layer)(x)
        names = [str(node.target) for node in graph.graph.nodes]
        assert "tokengate.measure.default" in names
        assert torch.equal(graph(x), layer(x))
    operations = torch.ops.tokengate
    with FakeTensorMode() as mode:
        out, z, up = (mode.from_tensor(torch.randn(s)) for s in ((3, 40), (3, 2), (40, 2)))
        sums = operations.measure(out, None, None, z, up, None)
        a = operations.decide(sums, mode.from_tensor(torch.ones(1)), torch.bool)
        h = operations.gated_sum(out, None, z, up, None, a)
    assert (sums.shape[1:], a.dtype, h.shape) == ((6, 3), torch.bool, (3, 40))


def test_gated_sum_of_blocks_is_not_asked(monkeypatch):
    monkeypatch.setattr(gated_sum, "blocks", None)
    x = torch.randn(3, 12)
    results(layer_of("dora", 12, 10, rank=2, bias=True), x, torch.ones(3, 10))
