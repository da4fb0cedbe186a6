"""Derivatives that are carried forward (`jvp`, `jacfwd`) equal those of backward."""

import pytest
import torch
from models import away_from_initialisation
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp

import tokengate

# Of torch's own, where it first loads what it carries forward by.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
METHODS = ["lora", "dora", "adalora", "adapter"]


class Soft(tokengate.Gate):
    """Reads sizes, which are constants in backward."""

    def weights(self, positions):
        return torch.sigmoid(10 * (positions.r.clamp(max=1e3) - 0.5))


class Whole(tokengate.Modification):
    """Without factors."""

    def __init__(self, linear, *, rank=1):
        super().__init__(linear)
        self.gain = self.new_parameter(self.out_features)

    def reset_parameters(self):
        nn.init.zeros_(self.gain)

    def forward(self, x, w):
        return self.gain * torch.tanh(w)


GATES = ["threshold", "sigmoid", "random", Soft, False]


def model_of(method, gate="threshold", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2, bias=False)).double()
    if method == "adapter":
        options["activation"] = "tanh"
    tokengate.patch(model, "all-linear", method, rank=2, gate=gate, **options)
    return away_from_initialisation(model, 1.0)


@pytest.mark.parametrize("method", [*METHODS, Whole])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_along_the_input(method, gate, training):
    model = model_of(method, gate).train(training)
    x, v = torch.randn(2, 5, 8, dtype=torch.float64)
    if gate == "threshold":
        tokengate.calibrate(model, [x], sparsity=0.4)
    with tokengate.disabled(model):
        base = jacfwd(model)(x)
    wanted = jacrev(model)(x)
    assert not torch.allclose(base, wanted, atol=0.01)
    torch.testing.assert_close(jacfwd(model)(x), wanted)
    out, tangent = jvp(model, (x,), (v,))
    torch.testing.assert_close(out, model(x))
    torch.testing.assert_close(tangent, torch.einsum("abcd,cd->ab", wanted, v))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v)))
    torch.testing.assert_close(dual.tangent, tangent)


@pytest.mark.parametrize("method", [*METHODS, Whole])
@pytest.mark.parametrize("gate", ["threshold", "sigmoid", Soft, False])
def test_along_the_parameters(method, gate):
    model, x = model_of(method, gate), torch.randn(5, 8, dtype=torch.float64)
    if gate == "threshold":
        tokengate.calibrate(model, [x], sparsity=0.4)
    if gate == "sigmoid":
        for layer in tokengate.layers(model).values():
            layer.gate.penalty = 0.0  # a gradient of its own, not one of the output
    values = {n: p.detach() for n, p in model.named_parameters() if "tau" not in n}

    def f(values):
        return functional_call(model, values, (x,))

    wanted, found = jacrev(f)(values), jacfwd(f)(values)
    for name in values:
        torch.testing.assert_close(found[name], wanted[name])
        assert wanted[name].any(), name


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives(method):
    model, x = model_of(method, tau=0.3), torch.randn(5, 8, dtype=torch.float64)

    def f(x):
        return model(x).square().sum()

    wanted = jacrev(jacrev(f))(x)
    assert wanted.any()
    torch.testing.assert_close(hessian(f)(x), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_with_dropout(method):
    model = model_of(method, dropout=0.4)
    x, v = torch.randn(2, 5, 8, dtype=torch.float64)

    def f(x):
        torch.manual_seed(3)
        return model(x)

    step = 1e-6
    wanted = (jvp(f, (x + step * v,), (v,))[0] - jvp(f, (x - step * v,), (v,))[0]) / (2 * step)
    tangent = jvp(f, (x,), (v,))[1]
    torch.testing.assert_close(tangent, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tangent, jvp(model.eval(), (x,), (v,))[1], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bits(method):
    model = model_of(method, dropout=0.4).to(torch.bfloat16)
    x, v = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    out, tangent = jvp(model.eval(), (x,), (v,))
    wanted = jvp(model.double(), (x.double(),), (v.double(),))[1]
    assert out.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.double(), wanted, rtol=0.1, atol=0.1)


def test_along_tau_there_is_none_and_it_says_so():
    model, x = model_of("lora", tau=0.3), torch.randn(5, 8, dtype=torch.float64)
    tau = model[0].gate.tau.detach()

    def f(tau):
        return functional_call(model, {"0.gate.tau": tau}, (x,))

    with pytest.warns(UserWarning, match="a derivative is taken forward along tau"):
        tangent = jvp(f, (tau,), (torch.ones_like(tau),))[1]
    assert not tangent.any()
    assert jacrev(f)(tau).any()  # the rule that tau learns by
