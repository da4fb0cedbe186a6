"""How much of the loss hangs on each layer, and the layers to modify that follow from it."""

from unittest import mock

import numpy as np
import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation, padded_bert, snapshot
from reference import fisher_scores as by_the_loop
from torch import nn
from torch.nn import functional as F

import tokengate
from tokengate.reports.report import ModuleSparsity

METHODS = ["lora", "dora", "adalora", "adapter", "own"]
GATES = [False, "threshold", "sigmoid", "random"]


class Own(tokengate.Modification):
    """A method without factors."""

    def __init__(self, linear):
        super().__init__(linear)
        self.gain = self.new_parameter(self.out_features)

    def reset_parameters(self):
        nn.init.zeros_(self.gain)

    def forward(self, x, w):
        return self.gain.to(w.dtype) * torch.tanh(w)


def patched(method, gate, seed=0):
    if method == "own":
        tokengate.register("own-of-fisher")(Own)
        method = "own-of-fisher"
    torch.manual_seed(seed)
    model = tokengate.patch(Net().double(), "all-linear", method, gate=gate)
    away_from_initialisation(model)
    for layer in tokengate.layers(model).values():
        if gate == "threshold":
            nn.init.constant_(layer.gate.tau, 0.5)
    return model


def of_net(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def batches_of(count, seed=0):
    torch.manual_seed(seed)
    return [
        (torch.randn(2, 5 + i, 8, dtype=torch.float64), torch.randint(3, (2, 5 + i)))
        for i in range(count)
    ]


def seen(model, batches, loss):
    """dL/dh, h and W0 x + b of every layer's calls, by autograd."""
    found = {name: [] for name in tokengate.layers(model)}
    for batch in batches:
        kept = []

        def keep(layer, args, h, *, name, kept):
            h.retain_grad()
            kept.append((name, h, F.linear(args[0], layer.weight, layer.bias)))

        hooks = [
            layer.register_forward_hook(
                lambda m, a, h, name=name, kept=kept: keep(m, a, h, name=name, kept=kept)
            )
            for name, layer in tokengate.layers(model).items()
        ]
        loss(model.eval(), batch).backward()
        for name, h, out in kept:
            found[name].append([t.detach().flatten(0, -2).numpy() for t in (h.grad, h, out)])
        for hook in hooks:
            hook.remove()
    return found


@given(st.sampled_from(METHODS), st.sampled_from(GATES), st.integers(1, 3), st.integers(0, 2**16))
@settings(max_examples=many(8), deadline=None)
def test_equal_the_loop(method, gate, count, seed):
    model = patched(method, gate, seed)
    batches = batches_of(count, seed)
    found = tokengate.fisher_scores(model, batches, loss=of_net)
    wanted = {name: by_the_loop(calls) for name, calls in seen(model, batches, of_net).items()}
    assert list(found) == list(wanted) == list(tokengate.layers(model))
    if gate is False:
        assert len({round(value, 12) for value in wanted.values()}) == len(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value / count, rel=1e-5, abs=1e-15)


def test_what_is_closed_holds_nothing():
    model = patched("lora", "threshold")
    before = tokengate.fisher_scores(model, batches_of(2), of_net)
    nn.init.constant_(model.blocks[0].fc1.gate.tau, 1e9)
    after = tokengate.fisher_scores(model, batches_of(2), of_net)
    assert before["blocks.0.fc1"] > 0
    assert after["blocks.0.fc1"] == 0
    assert after["blocks.1.fc1"] > 0


def test_padding_holds_nothing_and_the_loss_may_come_from_the_model():
    model, batch, each = padded_bert(gate=False)

    def first(model, batch):
        return model.eval()(**batch).last_hidden_state[:, 0].square().sum()

    whole = tokengate.fisher_scores(model, [batch], first)
    alone = tokengate.fisher_scores(model, each, first)
    assert not batch["attention_mask"].all()
    for name, value in whole.items():
        assert value > 0
        assert value == pytest.approx(len(each) * alone[name], rel=1e-4)


def test_nothing_is_left_behind():
    model = patched("dora", "threshold").train()
    batches = batches_of(2)
    of_net(model, batches[0]).backward()
    before, state = snapshot(model), torch.get_rng_state()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    tokengate.fisher_scores(model, batches, of_net)
    tokengate.suggest(model, batches, loss=of_net)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert any(gradient is not None for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


def test_a_gate_that_is_led_learns_nothing_of_it():
    def trained(looks):
        model = patched("lora", "fisher").train()
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
        tokengate.SparsitySchedule(model, optimizer, target=0.5, total_steps=20)
        others = batches_of(4, seed=1)
        for batch, other in zip(batches_of(4), others, strict=True):
            optimizer.zero_grad()
            of_net(model, batch).backward()
            if looks:
                tokengate.fisher_scores(model, [other], of_net)
            optimizer.step()
        return model.state_dict()

    alone, looked_at = trained(looks=False), trained(looks=True)
    assert any(value.any() for name, value in alone.items() if name.endswith("gate.Q"))
    assert all(torch.equal(value, looked_at[name]) for name, value in alone.items())


def test_select_keeps_the_highest_of_fisher_unless_told_otherwise():
    scores = {"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.2}
    assert tokengate.select(scores, 0.5, by="fisher") == ["a", "c"]
    assert tokengate.select(scores, 0.5, by="fisher", keep="lowest") == ["b", "d"]
    assert tokengate.select(scores, 0.5, by="Fisher") == ["a", "c"]
    assert tokengate.select(scores, 0.5) == ["b", "d"]  # as before


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"a": 0.0, "b": 0.0}, "all of fisher's scores are 0"),
        (
            tokengate.SparsityReport({"a": ModuleSparsity(0.5, 1, 10, 5, 0.1)}),
            "pass tokengate.fisher_scores",
        ),
    ],
)
def test_select_refuses_what_are_no_scores(numbers, message):
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.select(numbers, by="fisher")


def test_refusals():
    model = patched("lora", False)
    with pytest.raises(tokengate.TokenGateError, match="returned no loss"):
        tokengate.fisher_scores(model, [(batches_of(1)[0][0],)])
    with pytest.raises(tokengate.TokenGateError, match="no batches"):
        tokengate.fisher_scores(model, [], of_net)
    with pytest.raises(tokengate.TokenGateError, match="without"):
        tokengate.fisher_scores(Net(), batches_of(1), of_net)


class Paths(nn.Module):
    """Four layers side by side that reach the output by these factors."""

    def __init__(self, factors):
        super().__init__()
        self.paths = nn.ModuleList(nn.Linear(8, 8) for _ in factors)
        self.factors = factors

    def forward(self, x):
        return sum(f * torch.tanh(p(x)) for f, p in zip(self.factors, self.paths, strict=True))


def of_paths(model, batch):
    return (model(batch) - 3).square().mean()


@given(st.permutations([3.0, 1.0, 0.02, 0.0]), st.sampled_from(METHODS[:4]), st.booleans())
@settings(max_examples=many(8), deadline=None)
def test_an_untrained_model_names_the_layers_that_the_loss_asks_for(factors, method, is_patched):
    torch.manual_seed(0)
    model = Paths(factors)
    if is_patched:
        tokengate.patch(model, "all-linear", method)
    batch, before = torch.randn(4, 6, 8), snapshot(model)
    state = torch.get_rng_state()
    names = tokengate.suggest(model, [batch], 0.5, loss=of_paths)
    wanted = [f"paths.{i}" for i, factor in enumerate(factors) if factor >= 1]
    assert names == wanted
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    patched_with_them = tokengate.patch(Paths(factors), names, gate=False)
    assert list(tokengate.layers(patched_with_them)) == wanted


def test_a_trained_model_is_asked_what_it_holds_now():
    torch.manual_seed(0)
    model = tokengate.patch(Paths([3.0, 1.0]), "all-linear", gate=False)
    nn.init.normal_(model.paths[1].modification.B)  # the other one holds nothing yet
    batch = torch.randn(4, 6, 8)
    assert tokengate.suggest(model, [batch], 0.5, loss=of_paths) == ["paths.1"]


def test_a_rate_at_which_the_loss_does_not_fall_is_lowered_and_at_last_refused():
    torch.manual_seed(0)
    model, batch, rates = Paths([3.0, 1.0]), torch.randn(4, 6, 8), []
    adam = torch.optim.Adam

    def counted(parameters, lr):
        rates.append(lr)
        return adam(parameters, lr)

    before = snapshot(model)
    with mock.patch("tokengate.reports.measures.suggestion.Follower", counted):
        tokengate.suggest(model, [batch], loss=of_paths, steps=1, lr=20.0)
        assert rates == [20.0, 5.0, 1.25]
        with pytest.raises(tokengate.TokenGateError, match="pass a smaller lr"):
            tokengate.suggest(model, [batch], loss=of_paths, lr=1e9)
    assert len(rates) == 6
    assert snapshot(model) == before


def test_a_new_head_is_trained_along_and_put_back():
    torch.manual_seed(0)
    model, batch = Net(), torch.randn(4, 6, 8)
    seen = []

    def loss(model, batch):
        seen.append(model.head.weight.detach().clone())
        return model(batch).square().mean()

    before = snapshot(model)
    tokengate.suggest(model, [batch], targets=["fc1", "fc2"], train=["head"], loss=loss, steps=3)
    assert any(not torch.equal(each, seen[0]) for each in seen)
    assert snapshot(model) == before
    seen.clear()
    tokengate.suggest(model, [batch], targets=["fc1", "fc2"], loss=loss, steps=3)
    assert all(torch.equal(each, seen[0]) for each in seen)


def test_suggest_says_what_cannot_be_asked():
    model = Paths([1.0, 1.0]).eval()
    before = snapshot(model)
    nothing = lambda model, batch: model(batch).detach().sum()  # noqa: E731
    with pytest.raises(tokengate.TokenGateError, match="hangs on no layer"):
        tokengate.suggest(model, [torch.randn(2, 3, 8)], loss=nothing)
    with pytest.raises(tokengate.TokenGateError, match=r"paths\.7"):
        tokengate.suggest(model, [torch.randn(2, 3, 8)], targets=["paths.7"], loss=of_paths)
    assert snapshot(model) == before


def test_the_loop_can_tell_positions_apart():
    grad, h, out = np.eye(3), 2 * np.ones((3, 3)), np.diag([2.0, 1.0, 0.0])
    assert by_the_loop([(grad, h, out)]) == 0 + 1 + 4
