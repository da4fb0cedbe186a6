"""The unit of lambda: whatever multiplies or averages gradients, tau moves alike."""

import copy

import pytest
import torch
from models import away_from_initialisation
from torch import nn
from torch._dynamo.testing import CompileCounter

import tokengate
from tokengate import TokenGateError


def model_and_data(method="lora", dtype=torch.float32, penalty=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    tokengate.patch(model, "all-linear", method, rank=2, tau=0.3, penalty=penalty)
    away_from_initialisation(model, 0.3)
    return model, torch.randn(16, 5, 6, dtype=dtype), torch.randn(16, 5, 3, dtype=dtype)


def taus(model):
    return torch.cat(
        [layer.gate.tau.detach().clone() for layer in tokengate.layers(model).values()]
    )


def train(model, x, y, steps=20, ranks=1, parts=1, loss_scale=None):
    """`ranks` halves of the batch whose gradients are averaged, in `parts` micro-batches each."""
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-2))
    path = []
    for _ in range(steps):
        total = {}
        tokengate.scale_penalty(model, ranks * (loss_scale or 1.0))
        for rank in range(ranks):
            optimizer.zero_grad()
            for part in range(parts):
                index = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
                own_x, own_y = x[index].chunk(parts)[part], y[index].chunk(parts)[part]
                loss = (model(own_x) - own_y).float().square().mean() / parts
                (loss * (loss_scale or 1.0)).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total.get(name, 0) + parameter.grad / ranks
        for name, gradient in total.items():
            model.get_parameter(name).grad = gradient / (loss_scale or 1.0)
        optimizer.step()
        path.append(taus(model))
    return torch.stack(path)


SETTINGS = {
    "two ranks": {"ranks": 2},
    "four micro-batches": {"parts": 4},
    "a loss scale": {"loss_scale": 1024.0},
    "all": {"ranks": 2, "parts": 4, "loss_scale": 512.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", ["lora", "dora", "adapter"])
def test_the_same_tau_trajectory(method, setting):
    model, x, y = model_and_data(method)
    expected = train(copy.deepcopy(model), x, y)
    assert (expected[-1] - expected[0]).abs().min() > 1e-2, "tau moves"
    ours = train(copy.deepcopy(model), x, y, **SETTINGS[setting])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_without_the_factor_it_is_another_one():
    model, x, y = model_and_data()
    expected = train(copy.deepcopy(model), x, y)
    scale = tokengate.scale_penalty
    try:
        tokengate.scale_penalty = lambda model, factor: None
        ours = train(copy.deepcopy(model), x, y, ranks=2, loss_scale=1024.0)
    finally:
        tokengate.scale_penalty = scale
    assert (ours - expected).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [4.0, torch.tensor(4.0), torch.tensor([4.0])])
def test_it_multiplies_lambda_alone(factor):
    model, x, _ = model_and_data()

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for layer in tokengate.layers(model).values():
        layer.gate.penalty = 0.0
    without = gradients()
    for layer in tokengate.layers(model).values():
        layer.gate.penalty = 0.3
    once = gradients()
    tokengate.scale_penalty(model, factor)
    four = gradients()
    for name in once:
        lam = without[name] - once[name]
        assert lam.any() == name.endswith("tau")
        torch.testing.assert_close(without[name] - four[name], 4 * lam, rtol=1e-4, atol=1e-4)
    tokengate.scale_penalty(model, 1)
    for name, gradient in gradients().items():
        assert torch.equal(gradient, once[name])


def test_it_reaches_the_gates_of_all_adapters(tmp_path):
    model, x, _ = model_and_data()
    tokengate.save(model, tmp_path / "adapter")
    tokengate.load(model, tmp_path / "adapter", name="other")
    tokengate.use(model, None)
    tokengate.scale_penalty(model, 4.0)
    found = {}
    for name in ("default", "other"):
        with tokengate.use(model, name):
            model(x).square().sum().backward()
            gates = [layer.gate for layer in tokengate.layers(model).values()]
        found[name] = torch.cat([gate.tau.grad for gate in gates])
        assert [gate._unit for gate in gates] == [4.0, 4.0]
    torch.testing.assert_close(found["other"], found["default"])
    tokengate.scale_penalty(model, 1)
    with tokengate.use(model, "other"):
        assert all(layer.gate._unit is None for layer in tokengate.layers(model).values())


def test_the_user_s_penalty_stays_and_nothing_is_saved():
    model, _, _ = model_and_data()
    keys = list(model.state_dict())
    tokengate.scale_penalty(model, 8.0)
    assert [layer.gate.penalty for layer in tokengate.layers(model).values()] == [0.3, 0.3]
    assert list(model.state_dict()) == keys
    model.to(torch.bfloat16)
    assert all(
        layer.gate._unit.dtype == torch.float32 for layer in tokengate.layers(model).values()
    )


def test_a_change_between_forward_and_backward_is_the_next_one_s():
    model, x, _ = model_and_data()
    tokengate.scale_penalty(model, 2.0)
    model(x).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model(x).sum()
    tokengate.scale_penalty(model, 64.0)
    loss.backward()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name


def test_compiled_without_compiling_again():
    model, x, _ = model_and_data()
    counted = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    tokengate.scale_penalty(model, 2.0)
    compiled(x)
    before = counted.frame_count
    for factor in (4.0, 8.0, torch.tensor(16.0)):
        tokengate.scale_penalty(model, factor)
        compiled(x)
    assert counted.frame_count == before > 0


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), "2", None, torch.ones(2)])
def test_refused(factor):
    model, _, _ = model_and_data()
    with pytest.raises(TokenGateError, match="factor"):
        tokengate.scale_penalty(model, factor)
    with pytest.raises(TokenGateError, match="without a patched layer"):
        tokengate.scale_penalty(nn.Linear(2, 2), 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -2.0, 0.0])
def test_a_tensor_is_refused_where_its_value_is_known(value):
    model, _, _ = model_and_data()
    tokengate.scale_penalty(model, 3.0)
    for factor in (torch.tensor(value), torch.tensor([value]), nn.Parameter(torch.tensor(value))):
        with pytest.raises(TokenGateError, match=r"^factor=\S+ is not "):
            tokengate.scale_penalty(model, factor)
    assert all(layer.gate._unit == 3 for layer in tokengate.layers(model).values())

    # Not where there is no value, or none yet: reading one would fail, or break a graph.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        tokengate.scale_penalty(model, torch.tensor(value))
    with torch.device("meta"):
        bare = tokengate.patch(nn.Linear(4, 4), "all-linear", rank=2)
        tokengate.scale_penalty(bare, torch.tensor(value))
    with torch._subclasses.FakeTensorMode():
        bare = tokengate.patch(nn.Linear(4, 4), "all-linear", rank=2)
        tokengate.scale_penalty(bare, torch.tensor(value))
