"""fold decides expert by expert: merged into W0[e], dropped, or gated as before."""

import contextlib
import copy
import warnings

import numpy as np
import pytest
import reference
import torch
from expert_methods import METHODS, modify
from mixtures import Experts, Mixture
from models import snapshot

import tokengate
from tokengate.errors import LeftOutWarning, StillGatedWarning

# Always open, always closed, open at some positions, without a position.
TAUS = (-1.0, 1e6, None, 0.2)
ACTIONS = ("merged", "dropped", "kept", "kept")


def batch():
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(24, 3, generator=generator).topk(2, -1).indices
    return torch.randn(2, 12, 5, dtype=torch.double, generator=generator), index


def make(method="lora", axes="eoi", way="grouped", gate="threshold", part="", taus=TAUS, **options):
    torch.manual_seed(0)
    model = Mixture(Experts(4, 6, 5, axes, way=way).double())
    slices = {"experts.w": tokengate.Slices(groups=2, one=1, two=2)} if part else None
    tokengate.patch(
        model, [f"experts.w{part}"], method, rank=2, scale=0.5, gate=gate, penalty=0.3,
        experts={"experts.w": axes}, slices=slices, **options,
    )  # fmt: skip
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith("tau"):
            p.data += 0.3 * torch.randn_like(p)
    (layer,) = tokengate.layers(model).values()
    mean = tokengate.modification_norms(model, [batch()]).relative[f"experts.2.w{part}"]
    values = [mean if tau is None else tau for tau in taus]
    layer.gate.tau.data = torch.tensor(values, dtype=torch.double)
    return model.eval()


def weights(model):
    return model.experts.w.detach().clone()


@pytest.mark.parametrize("axes", ["eoi", "eio"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_equal_to_a_loop_over_experts_and_tokens(method, axes):
    model, (x, index) = make(method, axes), batch()
    (layer,) = tokengate.layers(model).values()
    W = layer.weight.detach().numpy().copy()
    parameters = {n: p.detach().numpy().copy() for n, p in layer.modification.named_parameters()}
    taus, b = layer.gate.tau.detach().numpy().copy(), model.experts.b.detach().numpy()
    grad = np.random.default_rng(0).standard_normal((24, 2, 6))
    wanted = reference.experts(
        x.flatten(0, 1).numpy(), index.numpy(), W, b, parameters,
        modify(method, METHODS[method], parameters, W, range(4)), taus, 0.3, grad,
    )  # fmt: skip
    assert {bool(s) for s in wanted["S"][index.numpy() == 2]} == {False, True}
    folding = tokengate.fold(model, [(x, index)])
    assert list(folding.layers) == [f"experts.{e}.w" for e in range(4)]
    assert tuple(each.action for each in folding.layers.values()) == ACTIONS
    assert folding.error < 1e-14
    (kept,) = tokengate.layers(model).values()
    assert kept is layer
    assert kept.experts == (2, 3)
    h = model(x, index)
    h.backward(torch.tensor(grad))
    close = {"atol": 1e-10, "rtol": 1e-10}
    np.testing.assert_allclose(h.detach().numpy(), wanted["h"], **close)
    for name, p in kept.modification.named_parameters():
        np.testing.assert_allclose(p.grad.numpy(), wanted[name][2:], **close, err_msg=name)
        assert wanted[name][2].any()
    np.testing.assert_allclose(kept.gate.tau.grad.numpy(), wanted["tau"][2:], **close)

    # The weight of the merged expert is what its modification makes of the unit vectors.
    now = (model.experts.w if axes == "eoi" else model.experts.w.mT).detach().numpy()
    of = modify(method, METHODS[method], parameters, W, range(4))
    columns = [W[0] @ unit + of(0, unit, W[0] @ unit)[0] for unit in np.eye(5)]
    assert np.abs(now[0] - W[0]).max() > 1e-2
    np.testing.assert_allclose(now[0], np.stack(columns, 1), **close)
    assert np.array_equal(now[1:], W[1:])


@pytest.mark.parametrize("part", ["", ".two"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_and_back_bit_for_bit(method, part):
    model, data = make(method, part=part), batch()
    h, before, W = model(*data), snapshot(model), weights(model)
    for way in ("undo", "unpatch"):
        folding = tokengate.fold(model, [data])
        folded = weights(model)
        assert folding.names("merged") == [f"experts.0.w{part}"]
        assert not torch.equal(folded, W)
        torch.testing.assert_close(model(*data), h, rtol=1e-12, atol=1e-12)
        with tokengate.disabled(model):
            assert torch.equal(weights(model), W)
        assert torch.equal(weights(model), folded)
        if way == "undo":
            folding.undo()
            assert snapshot(model) == before
            assert torch.equal(model(*data), h)
    tokengate.unpatch(model)
    assert type(model.experts) is Experts
    assert torch.equal(weights(model), W)


def test_what_is_kept_goes_on_to_learn_and_undo_gives_it_to_its_place():
    model, data = make(), batch()
    (layer,) = tokengate.layers(model).values()
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    folding = tokengate.fold(model, [data])
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.1), weight_decay=0.1)
    model.train()(*data).square().sum().backward()
    optimizer.step()
    learnt = {n: p.detach().clone() for n, p in layer.named_parameters()}
    folding.undo()
    for name, p in layer.named_parameters():
        assert torch.equal(p[:2], before[name][:2])
        assert torch.equal(p[2:], learnt[name])
        assert not torch.equal(p[2], before[name][2])
    assert layer.modification.training


@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_from_before_is_told_what_it_leaves_out(steps):
    model, data = make(), batch()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-9))

    def step():
        model(*data).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(steps):
        step()
    assert tokengate.fold(model, [data]).names("kept")
    step()
    with pytest.warns(LeftOutWarning, match="'experts.w.modification.A'"):
        step()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_saved_as_it_is_folded(tmp_path, method):
    model, data = make(method), batch()
    fresh = Mixture(Experts(4, 6, 5, way="grouped").double())
    fresh.experts.load_state_dict({"w": model.experts.w, "b": model.experts.b})
    h = model(*data)
    tokengate.fold(model, [data])
    tokengate.save(model, tmp_path / "folded")
    assert not torch.equal(fresh(*data), h)
    tokengate.load(fresh, tmp_path / "folded")
    (layer,) = tokengate.layers(fresh).values()
    assert layer.experts == (0, 2, 3)
    assert layer.gate.tau[0] == 0
    torch.testing.assert_close(fresh(*data), h, rtol=1e-12, atol=1e-12)
    (own,) = tokengate.layers(model).values()
    assert torch.equal(layer.modification.A[1:], own.modification.A)
    assert torch.equal(layer.gate.tau[1:], own.gate.tau)


def test_for_good(tmp_path):
    model, data = make(), batch()
    h = model(*data)
    with pytest.warns(StillGatedWarning, match="2 of 4 layers .* 'experts.2.w' .* 'experts.3.w'"):
        tokengate.merge_and_unload(model, [data])
    torch.testing.assert_close(model(*data), h, rtol=1e-12, atol=1e-12)
    tokengate.save(model, tmp_path / "left")
    merged = weights(model)
    tokengate.unpatch(model)
    assert torch.equal(weights(model), merged)
    tokengate.load(model, tmp_path / "left")
    (layer,) = tokengate.layers(model).values()
    assert layer.experts == (2, 3)
    torch.testing.assert_close(model(*data), h, rtol=1e-12, atol=1e-12)


def test_all_decided_nothing_stays_gated():
    model, data = make(taus=(-1.0, 1e6, -2.0, 1e6)), batch()
    assert tuple(tokengate.fold(model, [data]).layers["experts.3.w"].reason.split()[:2]) == (
        "no",
        "position",
    )
    tokengate.unpatch(model)
    model, every = make(taus=(-1.0, 1e6, -2.0, 1e6)), torch.arange(4).expand(24, 4)
    h = model(data[0], every)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folding = tokengate.merge_and_unload(model, [(data[0], every)])
    assert folding.names("merged") == ["experts.0.w", "experts.2.w"]
    assert folding.names("dropped") == ["experts.1.w", "experts.3.w"]
    assert type(model.experts) is Experts
    torch.testing.assert_close(model(data[0], every), h, rtol=1e-12, atol=1e-12)


def test_of_those_that_were_patched_alone():
    torch.manual_seed(0)
    model, data = Mixture(Experts(4, 6, 5, way="linear").double()), batch()
    tokengate.patch(model, [f"experts.{e}.w" for e in (1, 2)], rank=2, experts={"experts.w": "eoi"})
    (layer,) = tokengate.layers(model).values()
    layer.modification.B.data.normal_()
    mean = tokengate.modification_norms(model, [data]).relative["experts.2.w"]
    layer.gate.tau.data = torch.tensor([-1.0, mean], dtype=torch.double)
    h, W = model(*data), weights(model)
    folding = tokengate.fold(model, [data])
    assert [each.action for each in folding.layers.values()] == ["merged", "kept"]
    assert torch.equal(weights(model)[[0, 2, 3]], W[[0, 2, 3]])
    assert not torch.equal(weights(model)[1], W[1])
    assert layer.experts == (2,)
    torch.testing.assert_close(model(*data), h, rtol=1e-12, atol=1e-12)
    folding.undo()
    assert torch.equal(weights(model), W)
    assert layer.experts == (1, 2)
    assert torch.equal(model(*data), h)


def test_folded_experts_are_not_patched_again_and_copies_are_apart():
    model, data = make(taus=(-1.0, 1e6, -2.0, 1e6)), batch()
    every = torch.arange(4).expand(24, 4)
    folding = tokengate.fold(model, [(data[0], every)])
    with pytest.raises(tokengate.TokenGateError, match="is folded, with another weight"):
        tokengate.patch(model, ["experts.1.w"], experts={"experts.w": "eoi"})
    twin, before = copy.deepcopy(model), weights(model)
    tokengate.unpatch(twin)
    assert torch.equal(weights(model), before)
    folding.undo()
    assert torch.equal(weights(model), weights(twin))


def test_gates_that_fold_by_expert_cannot_be_led():
    model, data = make(), batch()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.1))
    schedule = tokengate.SparsitySchedule(model, optimizer, target=0.5, total_steps=10)
    folding = tokengate.fold(model, [data])
    assert set(folding.names("kept")) == set(folding.layers)
    assert "SparsitySchedule" in folding.layers["experts.0.w"].reason
    schedule.detach()
    assert tuple(each.action for each in tokengate.fold(model, [data]).layers.values()) == ACTIONS


def test_experts_whose_ranks_are_led_stay_together():
    model, data = make(method="adalora"), batch()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.1))
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=10)
    folding = tokengate.fold(model, [data])
    assert set(folding.names("kept")) == set(folding.layers)
    assert "RankAllocator" in folding.layers["experts.0.w"].reason
    del allocator


def test_interrupted_at_every_line_it_is_whole_or_not_at_all():
    from test_interruptions import DETACHING, FOLDING, Interrupted

    names = {*FOLDING, *DETACHING, "unfolded", "_reattach", "put_on", "take_off", "be_of", "take"}
    for way in ("fold", "undo"):
        for at in range(500):
            model, data = make(), batch()
            folding = tokengate.fold(model, [data]) if way == "undo" else None
            before, h = snapshot(model), model(*data)
            with Interrupted(names, at) as interrupted, contextlib.suppress(KeyboardInterrupt):
                folding.undo() if folding else tokengate.fold(model, [data])
            if not interrupted.happened:
                break
            assert torch.equal(model(*data), h)
            assert snapshot(model) == before
            tokengate.unpatch(model)
        assert at > 10
