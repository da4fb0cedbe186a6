"""An optimiser is told what it leaves out, also of what comes into use while it trains."""

import warnings

import pytest
import torch
from models import Net, away_from_initialisation
from torch import nn

import tokengate
from tokengate.errors import LeftOutWarning


def train(model, optimizer, steps=1):
    for _ in range(steps):
        model(torch.randn(2, 3, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def further_layers(model, folder):
    tokengate.patch(model, ["v_proj"], rank=2)


def another_adapter(model, folder):
    tokengate.save(model, folder)
    tokengate.load(model, folder, name="another")
    tokengate.use(model, "another")


@pytest.mark.parametrize(
    ("change", "left"),
    [(further_layers, "v_proj.modification"), (another_adapter, "adapters.another.modification")],
)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_comes_into_use_while_it_trains(steps, change, left, tmp_path):
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"], rank=2))

    def made():
        return torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))

    optimizer = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, steps)
        change(model, tmp_path / "adapter")
    with pytest.warns(LeftOutWarning, match=left) as told:
        train(model, optimizer, steps=4)
    assert [each.filename for each in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, made(), steps=3)


def test_adapters_that_take_turns_have_each_its_optimizer_or_are_named(tmp_path):
    model = tokengate.patch(Net(), ["q_proj"], rank=2)
    tokengate.save(model, tmp_path / "adapter")
    tokengate.load(model, tmp_path / "adapter", name="other")
    optimizers = {}
    for name in ("default", "other"):
        tokengate.use(model, name)
        optimizers[name] = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))

    def turns(optimizer_of):
        for _ in range(3):
            for name in ("default", "other"):
                tokengate.use(model, name)
                train(model, optimizer_of(name))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turns(optimizers.__getitem__)
    optimizers["other"].param_groups.clear()
    with pytest.warns(LeftOutWarning, match=r"adapters\.other"):
        turns(lambda name: optimizers["default"])


@pytest.mark.parametrize("waits", [True, False], ids=["another comes", "none comes"])
def test_an_optimizer_that_is_made_anew_in_each_phase_is_waited_for(waits):
    """The one that steps before it said that nothing moves the taus."""
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"], rank=2))
    weights, taus, *_ = tokengate.param_groups(model, lr=1e-3)
    first = torch.optim.AdamW([weights])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            tokengate.calibrate(model, [torch.randn(2, 9, 8)])
            second = torch.optim.Adam([taus])
            for _ in range(3):
                model(torch.randn(2, 3, 8)).square().mean().backward()
                first.step()
                if waits:
                    second.step()
    assert [each.category for each in told] == ([] if waits else [LeftOutWarning])


@pytest.mark.parametrize("learn_from", [None, 0.5])
def test_taus_that_a_schedule_sets_are_not_left_out(learn_from):
    """It was said that nothing moves them; where they are learned afterwards that is so."""
    torch.manual_seed(0)
    model = tokengate.patch(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), "all-linear", rank=2)
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1)[:1], momentum=0.9)
    tokengate.SparsitySchedule(model, optimizer, 0.5, 20, learn_from=learn_from)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
    found = [str(each.message) for each in told if each.category is LeftOutWarning]
    assert len(found) == (learn_from is not None)
    assert all("leaves out '0.gate.tau', '1.gate.tau'" in each for each in found)


def unpatched(model, folder):
    tokengate.unpatch(model)


def patched_anew(model, folder):
    tokengate.patch(tokengate.unpatch(model), ["q_proj"], rank=2)


def merged(model, folder):
    tokengate.merge_and_unload(model)


def one_less(model, folder):
    another_adapter(model, folder)
    tokengate.unpatch(model, name="default")


@pytest.mark.parametrize("change", [unpatched, patched_anew, merged, one_less])
def test_what_no_model_has_any_more(change, tmp_path):
    model = tokengate.patch(Net(), ["q_proj"], rank=2, tau=-1.0, train=["head"])
    away_from_initialisation(model)
    groups = tokengate.param_groups(model, lr=1e-3)
    optimizer, of_taus = torch.optim.AdamW(groups), torch.optim.Adam(groups[-1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, steps=3)
        change(model, tmp_path / "adapter")
    with pytest.warns(LeftOutWarning, match="holds 6 parameters that unpatch or merge") as told:
        train(model, optimizer)
    assert [each.filename for each in told] == [__file__]
    with pytest.warns(LeftOutWarning, match="holds 2 parameters that unpatch or merge"):
        of_taus.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_taus.step()


def test_what_a_folding_can_take_back_is_not_gone():
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"], rank=2, gate=False))
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
        folding = tokengate.fold(model, [torch.randn(2, 3, 8)])
        optimizer.step()
        folding.undo()
        before = model.blocks[0].q_proj.modification.B.detach().clone()
        train(model, optimizer, steps=3)
    assert not torch.equal(model.blocks[0].q_proj.modification.B, before)
