"""tau by its own rule beside any optimiser and scheduler, and what is said without it."""

import contextlib

import pytest
import torch
from followed import S, loss_of, made, matrices, near, numbers, taus_of, train, without
from torch import optim

import tokengate
from tokengate.errors import OtherRuleWarning


def bitsandbytes(name):
    return getattr(pytest.importorskip("bitsandbytes").optim, name)


OPTIMISERS = {
    "SGD": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD in groups": lambda m: optim.SGD(tokengate.param_groups(m, 0.1, S), momentum=0.9),
    "SGD without": lambda m: optim.SGD(without(m), momentum=0.9),
    "RMSprop": lambda m: optim.RMSprop(tokengate.param_groups(m, 1e-3, S)),
    "AdamW of all": lambda m: optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "Adagrad": lambda m: optim.Adagrad(m.parameters(), weight_decay=0.1),
    "Adafactor": lambda m: optim.Adafactor(tokengate.param_groups(m, 1e-3, S)),
    "Adafactor without": lambda m: optim.Adafactor(without(m)),
    "Muon without": lambda m: optim.Muon(matrices(m)),
    "Rprop": lambda m: optim.Rprop(m.parameters()),
    "AdEMAMix": lambda m: bitsandbytes("AdEMAMix")(tokengate.param_groups(m, 1e-3, S)),
    "Lion": lambda m: bitsandbytes("Lion")(m.parameters()),
}


BY_THEIR_OWN_RULE = ["SGD", "SGD in groups", "RMSprop", "Adagrad", "Rprop", "AdamW of all", "Lion"]


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_rule_is_the_papers_whatever_the_optimiser_is(kind):
    model = made()
    optimizer = OPTIMISERS[kind](model)
    tokengate.follow(model, optimizer, s=S)
    assert near(model, train(model, optimizer))
    assert numbers(model).abs().max() > S


@pytest.mark.parametrize("kind", BY_THEIR_OWN_RULE)
def test_without_it_tau_goes_elsewhere_which_is_said_once(kind):
    model = made()
    optimizer = OPTIMISERS[kind](model)
    with pytest.warns(OtherRuleWarning, match=r"4 taus.*tokengate\.follow") as said:
        wanted = train(model, optimizer)
    assert len(said) == 1
    assert said[0].filename == train.__code__.co_filename
    assert not near(model, wanted)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"betas": (0.9, 0.98), "weight_decay": 0.1}, "its weight decay"),
        ({"weight_decay": 0.0}, "a group of its own numbers"),
        ({"betas": (0.9, 0.98), "weight_decay": 0.0}, None),  # the paper's
    ],
)
def test_a_group_of_taus_made_by_hand(numbers, said):
    model = made()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    taus = {"params": [p for n, p in trained.items() if n.endswith("tau")], **numbers}
    others = {"params": [p for n, p in trained.items() if not n.endswith("tau")]}
    warned = pytest.warns(OtherRuleWarning, match=said) if said else contextlib.nullcontext()
    with warned:
        train(model, torch.optim.AdamW([others, taus], lr=S))


@pytest.mark.parametrize("kind", ["Adafactor", "AdEMAMix"])
def test_groups_whose_numbers_are_not_the_optimisers(kind):
    """It was TypeError: cannot unpack non-iterable float object."""
    model = made()
    optimizer = OPTIMISERS[kind](model)
    loss_of(model, 0).backward()
    with pytest.raises(tokengate.TokenGateError, match=r"param_groups\(model, lr\)\[:1\]"):
        optimizer.step()


def test_transformers_adafactor():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    for groups in (without, lambda m: tokengate.param_groups(m, 1e-3, S)):
        model = made()
        optimizer = transformers.Adafactor(groups(model), relative_step=False)
        tokengate.follow(model, optimizer, s=S)
        assert near(model, train(model, optimizer))


@pytest.mark.parametrize("held", [True, False])
def test_schedule_free(held):
    schedulefree = pytest.importorskip("schedulefree", reason="needs schedulefree")
    model = made()
    groups = [{"params": [*model.parameters()], "lr": 0.01}] if held else without(model)
    optimizer = schedulefree.AdamWScheduleFree(groups)
    tokengate.follow(model, optimizer, s=S)
    optimizer.train()
    wanted = train(model, optimizer)
    assert near(model, wanted)
    a = model.blocks[0].q_proj.modification.A
    before = a.detach().clone()
    optimizer.eval()
    assert not torch.equal(a, before)
    assert near(model, wanted)


SCHEDULERS = {
    "OneCycleLR": lambda o: optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=7),
    "CyclicLR": lambda o: optim.lr_scheduler.CyclicLR(o, 1e-3, 0.02, 3, cycle_momentum=False),
    "eta_min": lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 3, eta_min=0.01),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=2),
}


@pytest.mark.parametrize("first", ["follow", "schedule"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_with_one_number_for_all(kind, first):
    model = made()
    optimizer = optim.AdamW(tokengate.param_groups(model, 1e-2, S))
    if first == "follow":
        tokengate.follow(model, optimizer)  # with the s that param_groups was asked for
    scheduler = SCHEDULERS[kind](optimizer)
    if first == "schedule":
        tokengate.follow(model, optimizer)
    assert near(model, train(model, optimizer, after=scheduler.step))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_without_it(kind):
    model = made()
    optimizer = optim.AdamW(tokengate.param_groups(model, 1e-2, S))
    scheduler = SCHEDULERS[kind](optimizer)
    with pytest.warns(OtherRuleWarning, match="as a scheduler does that") as said:
        wanted = train(model, optimizer, after=scheduler.step)
    assert len(said) == 1
    assert numbers(model).max() > 2 * wanted.max()


def test_what_multiplies_all_rates_alike_is_not_warned_of():
    model = made()
    optimizer = optim.AdamW(tokengate.param_groups(model, 1e-2, S))
    warmup = optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    wanted = train(model, optimizer, after=warmup.step)
    assert 0 < numbers(model).max() < wanted.max()
    tau_adam = tokengate.TauAdam(taus_of(model), s=S)
    others = optim.SGD(without(model))
    train(model, others, 2, after=tau_adam.step)


def test_a_scheduler_of_its_own():
    model = made()
    optimizer = optim.SGD(without(model))
    following = tokengate.follow(model, optimizer, s=S)
    scheduler = optim.lr_scheduler.LambdaLR(following.adam, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, 1)
    once = numbers(model)
    scheduler.step()
    train(model, optimizer, 3)
    assert torch.equal(numbers(model), once)
    assert once.abs().min() > 0


def test_a_slope_from_the_steps_there_are_or_from_param_groups_or_the_papers():
    model = made()
    optimizer = optim.SGD(without(model))
    rate = lambda following: following.adam.param_groups[0]["lr"]  # noqa: E731
    assert rate(tokengate.follow(model, optimizer)) == 4e-5
    assert rate(tokengate.follow(model, optimizer, total_steps=100)) == pytest.approx(2e-2)
    assert rate(tokengate.follow(model, optimizer)) == pytest.approx(2e-2)  # asked before
    assert rate(tokengate.follow(model, optimizer, 1e-3, alpha=0.5)) == pytest.approx(5e-4)
    assert {layer.gate.s for layer in tokengate.layers(model).values()} == {1e-3}
    tokengate.param_groups(model, 1e-3, s=7e-4)
    assert rate(tokengate.follow(model, optimizer)) == 7e-4
