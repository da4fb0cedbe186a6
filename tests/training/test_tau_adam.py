"""Eq. 18-22 against the loop and against torch.optim.Adam, and the parameter groups."""

import math

import pytest
import reference
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation

import tokengate

directions = st.lists(
    st.floats(-1e4, 1e4).map(lambda g: 0.0 if abs(g) < 1e-6 else g), min_size=1, max_size=20
)


def follow(optimizer, tau, gs):
    trajectory = []
    for g in gs:
        tau.grad = torch.full_like(tau, -g)
        optimizer.step()
        trajectory.append(tau.item())
    return trajectory


@settings(max_examples=many(100), deadline=None)
@given(
    gs=directions,
    start=st.floats(-1, 1),
    s=st.sampled_from([4e-5, 1e-3, 0.1]),
    alpha=st.sampled_from([0.5, 1.0]),
    betas=st.sampled_from([(0.9, 0.98), (0.0, 0.5), (0.5, 0.0)]),
    eps=st.sampled_from([1e-8, 1e-2]),
)
def test_equals_the_equations_and_torch_adam(gs, start, s, alpha, betas, eps):
    wanted = reference.tau_adam(start, gs, s, alpha, *betas, eps)
    tau = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    other = torch.nn.Parameter(tau.detach().clone())
    ours = follow(tokengate.TauAdam([tau], s=s, alpha=alpha, betas=betas, eps=eps), tau, gs)
    torchs = follow(torch.optim.Adam([other], lr=alpha * s, betas=betas, eps=eps), other, gs)
    assert ours == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert torchs == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_positive_g_raises_tau_and_negative_g_lowers_it():
    tau = torch.nn.Parameter(torch.zeros(1))
    up = follow(tokengate.TauAdam([tau], s=0.1), tau, [3.0])
    assert up == [pytest.approx(0.1)]
    down = follow(tokengate.TauAdam([tau], s=0.1), tau, [-3.0])
    assert down == [pytest.approx(0.0, abs=1e-6)]


def test_defaults_are_the_papers():
    group = tokengate.TauAdam([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["s"], group["lr"], group["betas"], group["eps"]) == (4e-5, 1.0, (0.9, 0.98), 1e-8)


def test_a_tau_without_gradient_stays_and_counts_no_step():
    moved, still = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = tokengate.TauAdam([moved, still], s=0.1)
    moved.grad = torch.ones(1)
    optimizer.step()
    assert moved.item() == pytest.approx(-0.1)
    assert still.item() == 0
    assert still not in optimizer.state


def test_resuming_from_a_state_dict_is_exact():
    gs = [1.0, -2.0, 0.5, -0.1, 3.0]
    tau = torch.nn.Parameter(torch.zeros(1))
    whole = follow(tokengate.TauAdam([tau], s=0.1), tau, gs)
    first = torch.nn.Parameter(torch.zeros(1))
    optimizer = tokengate.TauAdam([first], s=0.1)
    follow(optimizer, first, gs[:2])
    second = torch.nn.Parameter(first.detach().clone())
    resumed = tokengate.TauAdam([second], s=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    assert follow(resumed, second, gs[2:]) == whole[2:]


def test_a_scheduler_schedules_alpha():
    tau = torch.nn.Parameter(torch.zeros(1))
    optimizer = tokengate.TauAdam([tau], s=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert follow(optimizer, tau, [1.0]) == [pytest.approx(0.05)]


def test_step_returns_the_closures_loss():
    tau = torch.nn.Parameter(torch.ones(1))
    optimizer = tokengate.TauAdam([tau], s=0.1)

    def closure():
        optimizer.zero_grad()
        loss = tau.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert tau.item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s": -1e-5}, "s=-1e-05 is negative"),
        ({"s": math.nan}, "s=nan is not a finite"),
        ({"s": "small"}, "s='small' is not a finite"),
        ({"s": True}, "s=True is not a finite"),
        ({"alpha": -1.0}, "alpha=-1.0 is negative"),
        ({"alpha": math.inf}, "alpha=inf is not a finite"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 is not in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\]=-0.1 is not in \[0, 1\)"),
        ({"betas": 0.9}, "betas=0.9 is not a pair"),
        ({"eps": 0.0}, "eps=0.0 is not above 0"),
        ({"eps": math.nan}, "eps=nan is not a finite"),
    ],
)
def test_bad_numbers(options, message):
    tau = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.TauAdam([tau], **options)
    group = {("lr" if key == "alpha" else key): value for key, value in options.items()}
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.TauAdam([{"params": [tau], **group}])
    model = tokengate.patch(Net(), ["q_proj"])
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.param_groups(model, lr=1e-3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 is negative"),
        ({"lr": math.nan}, "lr=nan is not a finite"),
        ({"lr": 1.0, "weight_decay": -0.1}, "weight_decay=-0.1 is negative"),
    ],
)
def test_bad_numbers_of_param_groups(options, message):
    model = tokengate.patch(Net(), ["q_proj"])
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.param_groups(model, **options)


def test_groups_hold_every_trainable_parameter_once():
    model = tokengate.patch(Net(), ["q_proj", "v_proj"], train=["head"])
    first, second = tokengate.param_groups(model, lr=1e-3, s=4e-5, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in first["params"]) == [
        "blocks.0.q_proj.modification.A",
        "blocks.0.q_proj.modification.B",
        "blocks.0.v_proj.modification.A",
        "blocks.0.v_proj.modification.B",
        "blocks.1.q_proj.modification.A",
        "blocks.1.q_proj.modification.B",
        "blocks.1.v_proj.modification.A",
        "blocks.1.v_proj.modification.B",
        "head.bias",
        "head.weight",
    ]
    assert sorted(names[id(p)] for p in second["params"]) == [
        "blocks.0.q_proj.gate.tau",
        "blocks.0.v_proj.gate.tau",
        "blocks.1.q_proj.gate.tau",
        "blocks.1.v_proj.gate.tau",
    ]
    del first["params"], second["params"]
    assert first == {"lr": 1e-3, "weight_decay": 0.1}
    assert second == {"lr": 4e-5, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0}


def test_groups_without_a_gate_or_without_anything():
    model = tokengate.patch(Net(), ["q_proj"], gate=False)
    (only,) = tokengate.param_groups(model, lr=1e-3)
    assert "weight_decay" not in only
    model.requires_grad_(False)
    with pytest.raises(tokengate.TokenGateError, match="no parameter of this Net is trainable"):
        tokengate.param_groups(model, lr=1e-3)
    with pytest.raises(tokengate.TokenGateError, match="param_groups was asked of a Net without"):
        tokengate.param_groups(Net(), lr=1e-3)
    gated = tokengate.patch(Net(), ["q_proj"]).requires_grad_(False)
    with pytest.raises(tokengate.TokenGateError, match="no parameter of this Net is trainable"):
        tokengate.param_groups(gated, lr=1e-3, s=0.1)
    assert all(layer.gate.s is None for layer in tokengate.layers(gated).values())


@pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_any_optimiser_moves_tau(optimizer):
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"], tau=0.5))
    opt = optimizer(tokengate.param_groups(model, lr=1e-3, s=1e-3))
    model(torch.randn(2, 5, 8)).square().sum().backward()
    opt.step()
    for layer in tokengate.layers(model).values():
        assert layer.gate.tau.item() != 0.5


def test_one_adamw_over_both_groups_is_eq_22_for_tau():
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"], tau=0.5, penalty=0.1))
    opt = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-2), weight_decay=0.5)
    gs, seen = {}, {}
    for _ in range(5):
        opt.zero_grad()
        model(torch.randn(2, 5, 8)).square().sum().backward()
        for name, layer in tokengate.layers(model).items():
            gs.setdefault(name, []).append(-layer.gate.tau.grad.item())
        opt.step()
        for name, layer in tokengate.layers(model).items():
            seen.setdefault(name, []).append(layer.gate.tau.item())
    for name, g in gs.items():
        assert seen[name] == pytest.approx(reference.tau_adam(0.5, g, 1e-2), rel=1e-5)


def test_tau_moves_both_ways_in_training():
    """With nothing but training: it rises from 0 until closed positions pull it back."""
    model = tokengate.patch(Net(), "all-linear", penalty=0.0)
    opt = torch.optim.AdamW(tokengate.param_groups(model, lr=3e-2, s=1e-2))
    taus = [layer.gate.tau for layer in tokengate.layers(model).values()]
    x, y = torch.randn(8, 5, 8), torch.randn(8, 5, 3)
    trajectory = [[0.0] * len(taus)]
    for _ in range(300):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        trajectory.append([tau.item() for tau in taus])
    steps = torch.tensor(trajectory).diff(dim=0)
    assert ((steps > 1e-3).sum(0) > 20).all()  # every tau rises
    assert ((steps < -1e-3).sum(0) > 20).sum() >= 3  # and several fall again, often
