"""Several adapters on one model, one of them in use."""

import copy
import pickle
import sys

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence, snapshot
from three_adapters import KINDS, X, alone, fresh, run
from torch import nn

import tokengate
from tokengate import Slices, TokenGateError
from tokengate.layers import using
from tokengate.layers.named_adapters import put_in_use
from tokengate.layers.patched import all_layers

# Some of the optimisers here move tau by another rule than its own.
pytestmark = pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")


def test_each_is_what_it_is_alone(model):
    expected = {name: run(alone(name)) for name in KINDS}
    assert not torch.equal(expected["a"], expected["b"])
    assert torch.equal(run(model), expected["a"])
    for name in ("b", "c", "a", "c", "b"):
        tokengate.use(model, name)
        assert torch.equal(run(model), expected[name])
        assert list(tokengate.layers(model)) == list(tokengate.layers(alone(name)))
    tokengate.use(model, None)
    assert torch.equal(run(model), run(fresh()))
    assert tokengate.layers(model) == {}


def test_a_context_gives_back_what_was_in_use(model):
    before = snapshot(model)
    with tokengate.use(model, "b"):
        assert torch.equal(run(model), run(alone("b")))
        with tokengate.use(model, ["c", None, "a", "b"]):
            assert not torch.equal(run(model), run(alone("b")))
        with pytest.raises(RuntimeError, match="elsewhere"), tokengate.use(model, ["c", None]):
            raise RuntimeError("elsewhere")
        assert torch.equal(run(model), run(alone("b")))
        with tokengate.use(model, None):
            assert torch.equal(run(model), run(fresh()))
    after = snapshot(model)
    for state in (before, after):
        state.pop("attributes")  # that it was used once
    assert before == after


def test_further_layers_are_of_the_adapter_in_use(folders):
    model = fresh()
    tokengate.load(model, folders["a"], name="a")
    tokengate.patch(model, ["fc2"])
    assert "blocks.0.fc2" in tokengate.layers(model)
    tokengate.use(model, None)
    with pytest.raises(TokenGateError, match=r"patch was asked of a model none of whose"):
        tokengate.patch(model, ["v_proj"])
    tokengate.use(model, "a")
    assert "blocks.0.fc2" in tokengate.layers(model)


def test_only_what_is_in_use_is_trained(model):
    def trainable():
        return {id(p) for p in model.parameters() if p.requires_grad}

    first = trainable()
    assert first == {
        id(p)
        for layer in tokengate.layers(model).values()
        for part in (layer.modification, layer.gate)
        for p in part.parameters()
    }
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(X).square().mean().backward()
    optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert not any("adapters" in name for name in changed)
    tokengate.use(model, "b")
    assert not trainable() & first
    model.blocks[0].fc2.modification.A.requires_grad_(False)
    tokengate.use(model, "a")
    assert trainable() == first
    tokengate.use(model, "b")
    assert not model.blocks[0].fc2.modification.A.requires_grad
    assert model.blocks[0].fc2.modification.B.requires_grad


def test_each_can_be_saved_and_replaced(model, folders, tmp_path):
    tokengate.save(model, tmp_path / "c", name="c")
    other = fresh().eval()
    tokengate.load(other, tmp_path / "c")
    assert torch.equal(run(other), run(alone("c")))
    assert torch.equal(run(model), run(alone("a")))
    with tokengate.use(model, "b"), torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.modification.B.mul_(3)
        assert not torch.equal(run(model), run(alone("b")))
    tokengate.load(model, folders["b"], name="b")
    assert torch.equal(run(model), run(alone("a")))
    tokengate.use(model, "b")
    assert torch.equal(run(model), run(alone("b")))
    with pytest.raises(TokenGateError, match=r"does not fit.*'blocks.0.q_proj'"):
        tokengate.load(model, folders["a"], name="b")


def test_what_patch_adds_is_called_default(folders):
    model = alone("a")
    tokengate.load(model, folders["b"], name="b")
    assert torch.equal(run(model), run(alone("a")))
    tokengate.use(model, "b")
    assert torch.equal(run(model), run(alone("b")))
    tokengate.use(model, "default")
    assert torch.equal(run(model), run(alone("a")))


def test_slices_have_several_too(tmp_path):
    def build(name):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24))
        if name:
            slices = {"0": Slices(q=8, k=8, v=8)}
            tokengate.patch(model, [f"0.{part}" for part in name], slices=slices)
            torch.manual_seed(len(name))
            away_from_initialisation(model)
        return model

    both = build("")
    for name in ("q", "qv"):
        tokengate.save(build(name), tmp_path / name)
        tokengate.load(both, tmp_path / name, name=name)
    for name in ("qv", "q", "qv"):
        tokengate.use(both, name)
        assert torch.equal(run(both), run(build(name)))
    with tokengate.use(both, ["q", None, "qv", "q"]):
        expected = torch.stack(
            [run(build(n or ""), X)[i] for i, n in enumerate(["q", None, "qv", "q"])]
        )
        assert torch.allclose(run(both), expected, atol=1e-6)
    tokengate.use(both, "q")
    tokengate.unpatch(both, name="qv")
    assert list(tokengate.layers(both)) == ["0.q"]
    assert not hasattr(both[0], "v")
    assert torch.equal(run(both), run(build("q")))


def test_unpatch_and_disabled_know_all_of_them(model):
    base = snapshot(fresh().eval())
    with tokengate.use(model, ["a", "b", None, "c"]), tokengate.disabled(model):
        assert torch.equal(run(model), run(fresh()))
    tokengate.use(model, "b")
    tokengate.unpatch(model)
    found = snapshot(model)
    for key in ("values", "attributes"):
        assert found[key] == base[key]
    assert [kind for _, kind, _ in found["modules"].values()] == [
        kind for _, kind, _ in base["modules"].values()
    ]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_one_of_several_is_taken_out(model, folders, gone, tmp_path):
    base = snapshot(fresh().eval())
    left = [name for name in KINDS if name != gone]
    tokengate.use(model, left[0])
    before, modules = {id(p) for p in model.parameters()}, list(model.modules())
    with tokengate.use(model, gone):
        own = {
            id(p)
            for layer in tokengate.layers(model).values()
            for part in (layer.modification, layer.gate)
            if part is not None
            for p in part.parameters()
        }
    assert tokengate.unpatch(model, name=gone) is model
    assert {id(p) for p in model.parameters()} == before - own
    kept = sum(len(alone(name).state_dict()) - len(base["values"]) for name in left)
    assert len(model.state_dict()) == len(base["values"]) + kept
    for name in left:
        tokengate.use(model, name)
        assert torch.equal(run(model), run(alone(name)))
        assert list(tokengate.layers(model)) == list(tokengate.layers(alone(name)))
    with tokengate.use(model, [None, *left, None]):
        assert torch.equal(run(model)[0], run(fresh())[0])
    # What it alone has modified is as it was.
    wanted = set().union(*(tokengate.layers(alone(name)) for name in left))
    assert all_layers(model).keys() == wanted
    gone_from = [m for m in modules if type(m) is nn.Linear]
    assert not any(hasattr(m, "adapters") or hasattr(m, "_adapters") for m in gone_from)
    # It can come again.
    tokengate.load(model, folders[gone], name=gone)
    tokengate.use(model, gone)
    assert torch.equal(run(model), run(alone(gone)))
    tokengate.save(model, tmp_path)
    other = fresh().eval()
    tokengate.load(other, tmp_path)
    assert torch.equal(run(other), run(alone(gone)))
    tokengate.unpatch(model)
    assert snapshot(model)["values"] == base["values"]
    assert not any("tokengate" in key for m in model.modules() for key in vars(m))


def test_the_last_that_is_left_is_folded_and_undone(model):
    """Whoever is alone stands where one that was never beside others does."""
    tokengate.use(model, "c")
    for name in ("a", "b"):
        tokengate.unpatch(model, name=name)
    before, expected = snapshot(model), run(alone("c"))
    folding = tokengate.fold(model, [X])
    assert torch.allclose(run(model), expected, atol=1e-5)
    folding.undo()
    assert torch.equal(run(model), expected)
    after = snapshot(model)
    for state in (before, after):
        state.pop("attributes")
    assert before == after


def refused_to_take(model, name, *words):
    before = snapshot(model)
    with one_sentence(*words):
        tokengate.unpatch(model, name=name)
    assert snapshot(model) == before


def test_who_is_needed_is_not_taken_out(model):
    refused_to_take(model, "d", "'d'", "'a', 'b', 'c'")
    refused_to_take(model, 3, "3", "'a', 'b', 'c'")
    refused_to_take(model, "a", "in use")
    for used in ("b", ["b", None, None, None], {"b": torch.ones(4, 5).bool()}):
        with tokengate.use(model, used):
            refused_to_take(model, "b", "in use")
            refused_to_take(model, "a", "in use")  # by the model
    refused_to_take(fresh(), "a", "none")
    refused_to_take(alone("a"), "default", "no other", "unpatch(model)")
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3, s=1e-3))
    schedule = tokengate.SparsitySchedule(model, optimizer, target=0.5, total_steps=9)
    tokengate.use(model, "b")
    refused_to_take(model, "a", "SparsitySchedule", "'blocks.0.q_proj'", "detach()")
    schedule.detach()
    tokengate.unpatch(model, name="a")
    with pytest.raises(TokenGateError, match="name='b'"):
        tokengate.unpatch(model, adapter_name="b")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own(model, copied):
    twin = copied(model)
    tokengate.use(twin, "b")
    with torch.no_grad():
        for layer in tokengate.layers(twin).values():
            layer.modification.B.mul_(3)
    assert not torch.equal(run(twin), run(alone("b")))
    assert torch.equal(run(model), run(alone("a")))
    with tokengate.use(model, "b"):
        assert torch.equal(run(model), run(alone("b")))


def test_casts_and_modes_reach_what_rests(model):
    model.to(torch.float64).train()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    tokengate.use(model, "b")
    assert all(m.training for m in model.modules())


def test_nothing_is_made_or_copied_by_a_switch(model):
    def everything():
        return sorted(id(p) for p in model.parameters())

    before = everything()
    for name in ("b", "c", None, "a"):
        tokengate.use(model, name)
        assert everything() == before


def test_bad_input_is_refused(model, folders, tmp_path):
    before = snapshot(model)

    def refused(match, name):
        with pytest.raises(TokenGateError, match=match):
            tokengate.use(model, name)
        assert snapshot(model) == before

    refused("'d', and the model's adapters are 'a', 'b', 'c'", "d")
    refused("'d', and", ["a", "d"])
    refused("given 3, and", [3])
    refused("no names", [])
    for name in ("", "a.b", "items", 3):
        with pytest.raises(TokenGateError, match="cannot be an adapter's"):
            tokengate.load(model, folders["a"], name=name)
    with pytest.raises(TokenGateError, match="without a patched layer"):
        tokengate.use(Net(), "a")
    with pytest.raises(TokenGateError, match="several adapters"):
        tokengate.fold(model, [X])
    tokengate.use(model, None)
    with pytest.raises(TokenGateError, match="none of whose adapters is in use"):
        tokengate.param_groups(model, lr=0.1)


def test_parameters_beside_the_layers_are_one_adapters(folders, tmp_path):
    model = alone("a")
    head = tokengate.patch(fresh(), ["fc1"], train=["head"])
    with torch.no_grad():
        head.head.weight.mul_(2)
    tokengate.save(head, tmp_path)
    before = snapshot(model)
    with pytest.raises(TokenGateError, match=r"'head.weight', which is not one layer's"):
        tokengate.load(model, tmp_path, name="b")
    assert snapshot(model) == before
    with torch.no_grad():
        model.head.weight.mul_(2)
    tokengate.load(model, tmp_path, name="b")


@pytest.mark.parametrize("used", ["default", ["default"] * 4])
@pytest.mark.parametrize("away", ["unpatch", "fold"])
def test_layers_may_become_plain_within_the_context(used, away):
    model = tokengate.patch(fresh(), ["fc1"], gate=False)
    with tokengate.use(model, used):
        tokengate.unpatch(model) if away == "unpatch" else tokengate.fold(model, [X])
    assert all(type(block.fc1) is nn.Linear for block in model.blocks)
    assert not any(hasattr(block.fc1, "_adapters") for block in model.blocks)


def test_what_is_assigned_while_out_of_use_is_trained_in_use(model):
    tokengate.use(model, "b")
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    tokengate.use(model, "a")
    model.load_state_dict({n: v.clone() for n, v in model.state_dict().items()}, assign=True)
    tokengate.use(model, "b")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted


def test_an_interrupted_use_is_none(model, monkeypatch):
    before, calls = snapshot(model), []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put_in_use(*args, **options)

    monkeypatch.setattr(using, "put_in_use", interrupted)
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    tokengate.use(model, "b")  # takes effect when the object goes, where nothing can be raised
    assert [each.exc_type for each in unraisable] == [KeyboardInterrupt]
    assert snapshot(model) == before
    assert torch.equal(run(model), run(alone("a")))
