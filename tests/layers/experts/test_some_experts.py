"""Some experts of a projection: named one by one, as reports and `select` do."""

import re
import types

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import Experts, Mixture

import tokengate
from tokengate.patterns import FullName

AXES = {"experts.w": "eoi"}
SLICES = {"experts.w": tokengate.Slices(one=3, two=3)}


def away(model):
    """From the initial values, where M(x) is 0."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith("tau"):
            p.data += 0.5 * torch.randn(p.shape, generator=generator)
    return model


def make(targets, way="grouped", sizes=(6, 5), rank=2, **options):
    torch.manual_seed(0)
    model = Mixture(Experts(4, *sizes, way=way))
    return away(tokengate.patch(model, targets, rank=rank, experts=AXES, **options))


def batch(inputs=5):
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(8, 4, generator=generator).topk(2, -1).indices
    return torch.randn(2, 4, inputs, generator=generator), index


def patched(model):
    return {name: list(layer.experts) for name, layer in tokengate.layers(model).items()}


@settings(max_examples=many(40))
@given(st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(0, 3)), st.booleans())
def test_what_is_meant_is_what_is_named_and_not_excluded(named, excluded, full):
    targets = [f"experts.{e}.w" for e in sorted(named)]
    targets = [FullName(name) for name in targets] if full else targets
    exclude = [f"experts.{e}" for e in sorted(excluded)] or None
    model = Mixture(Experts(4, 6, 5))
    if named & excluded:
        with pytest.raises(tokengate.TokenGateError, match="matches only what exclude"):
            tokengate.patch(model, targets, experts=AXES, exclude=exclude)
        return
    tokengate.patch(model, targets, experts=AXES, exclude=exclude)
    assert patched(model) == {"experts.w": sorted(named)}
    if excluded and excluded != {0, 1, 2, 3}:
        tokengate.unpatch(model)
        tokengate.patch(model, ["experts.w"], experts=AXES, exclude=exclude)
        assert patched(model) == {"experts.w": sorted({0, 1, 2, 3} - excluded)}


@pytest.mark.parametrize(
    ("targets", "experts"),
    [
        (["3.w"], [3]),
        (["*.[02].w"], [0, 2]),
        ([re.compile(r"experts\.(1|3)\.w")], [1, 3]),
        (["experts.1.w", "w"], [0, 1, 2, 3]),
        (["experts.1.w", "experts.1.w", "experts.0.w"], [0, 1]),
    ],
)
def test_by_suffixes_globs_and_expressions(targets, experts):
    assert patched(make(targets)) == {"experts.w": experts}


@pytest.mark.parametrize(
    ("targets", "options", "says"),
    [
        (["experts.4.w"], {}, "matches no module"),
        (["experts.03.w"], {}, "matches no module"),
        (["experts.3"], {}, "matches no module"),
        (["experts.w"], {"exclude": ["experts.*.w"]}, "only what exclude|all of whose experts"),
        (
            ["experts.1.w", "experts.2.w.one"],
            {"slices": SLICES},
            "names 'experts.w' and its slice 'experts.w.one'",
        ),
    ],
)
def test_refused_in_a_sentence(targets, options, says):
    with pytest.raises(tokengate.TokenGateError, match=says):
        make(targets, **options)


def test_others_of_a_patched_projection_are_refused():
    model = make(["experts.1.w"])
    with pytest.raises(tokengate.TokenGateError, match="has patched experts already"):
        tokengate.patch(model, ["experts.2.w"], experts=AXES)


def test_slices_of_some():
    model = make(["experts.1.w.two", "experts.3.w.two"], slices=SLICES)
    assert patched(model) == {"experts.w.two": [1, 3]}
    x, index = batch()
    with tokengate.disabled(model):
        base = model(x, index)
    changed = (model(x, index) != base).unflatten(-1, (2, 3)).any(-1)
    assert torch.equal(changed[..., 1], (index == 1) | (index == 3))
    assert not changed[..., 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["linear", "batched", "grouped"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
def test_rows_of_others_are_the_bases_bit_for_bit(method, way, dtype, monkeypatch):
    """Also where torch's own kernel multiplies, which leaves rows of nobody as memory was."""
    real, calls = torch.nn.functional.grouped_mm, []

    def leaves_the_rest(left, right, *, offs):
        calls.append(left)
        out = real(left, right, offs=offs)
        if left.dim() == 2 and right.dim() == 3:
            out[offs[-1] :] = torch.nan
        return out

    kernels = types.SimpleNamespace(grouped_mm=leaves_the_rest)
    monkeypatch.setattr("tokengate.kernels.groups.F", kernels)
    model = make(["experts.1.w", "experts.2.w"], way, (8, 8), 8, method=method).to(dtype)
    x, index = batch(8)
    x = x.to(dtype)
    x[0, 0, 0] = torch.inf
    with tokengate.disabled(model):
        base = model(x, index)
    h = model(x, index)
    own = (index == 1) | (index == 2)
    assert torch.equal(h[~own].nan_to_num(7), base[~own].nan_to_num(7))
    x[0, 0, 0] = 0.5
    states = x.clone().requires_grad_()
    h = model(states, index)
    with tokengate.disabled(model):
        changed = (h != model(x, index)).any(-1)
    assert changed[own].all() or (method == "adapter" and changed.any())  # whose units may be off
    h.float().square().sum().backward()
    assert states.grad.isfinite().all()
    assert bool(calls) is (way != "linear")
    (layer,) = tokengate.layers(model).values()
    for parameter in layer.modification.parameters():
        assert len(parameter) == 2
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_reported_calibrated_and_counted_alone():
    model, (x, index) = make(["experts.1.w", "experts.3.w"]), batch()
    names = ["experts.1.w", "experts.3.w"]
    with tokengate.record(model) as rec:
        model(x, index)
    found = rec.report().modules
    assert list(found) == names
    assert [found[n].positions for n in names] == [int((index == e).sum()) for e in (1, 3)]
    assert list(tokengate.calibrate(model, [(x, index)], 0.5)) == names
    assert tokengate.count(model).gates == 2
    with tokengate.record(model) as rec:
        model(x, index)
    assert tokengate.select(rec.report(), 0.5, keep="highest") in ([names[0]], [names[1]])
    norms = tokengate.modification_norms(model, [(x, index)])
    (best,) = tokengate.select(norms.relative, 0.5, keep="highest")
    before = model.experts.w.detach().clone()
    assert type(tokengate.unpatch(model).experts) is Experts
    tokengate.patch(model, [best], experts=AXES)
    assert patched(model) == {"experts.w": [int(best.split(".")[1])]}
    assert torch.equal(model.experts.w, before)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
def test_saved_and_loaded(tmp_path, method):
    model, (x, index) = make(["experts.1.w", "experts.3.w"], method=method), batch()
    tokengate.save(model, tmp_path / "some")
    fresh = Mixture(Experts(4, 6, 5, way="grouped"))
    fresh.experts.load_state_dict({"w": model.experts.w, "b": model.experts.b})
    assert not torch.equal(fresh(x, index), model(x, index))
    tokengate.load(fresh, tmp_path / "some")
    assert patched(fresh) == {"experts.w": [1, 3]}
    assert torch.equal(fresh(x, index), model(x, index))
    tokengate.load(model, tmp_path / "some", name="another")
    with tokengate.use(model, "another"):
        assert torch.equal(fresh(x, index), model(x, index))
    other = make(["experts.0.w", "experts.3.w"], method=method)
    for target in ({}, {"name": "another"}):
        with pytest.raises(tokengate.TokenGateError, match=r"is of the experts \[1, 3\] in the "):
            tokengate.load(other, tmp_path / "some", **target)
    with pytest.raises(tokengate.TokenGateError, match="is of expert 3, and the model has 3"):
        tokengate.load(Mixture(Experts(3, 6, 5)), tmp_path / "some")


def test_adapters_of_experts_are_described_and_compared(tmp_path, capsys):
    from tokengate.command_line import main

    for name, experts in (("one", (1, 3)), ("other", (0, 3))):
        model = make([f"experts.{e}.w" for e in experts])
        (layer,) = tokengate.layers(model).values()
        layer.gate.tau.data = torch.tensor([0.1, 0.25])
        tokengate.save(model, tmp_path / name)
    assert not main(["inspect", str(tmp_path / "one")])
    said = capsys.readouterr().out
    assert "1 gated" in said
    assert "0.1 to 0.25" in said
    main(["diff", str(tmp_path / "one"), str(tmp_path / "other")])
    assert "experts [1, 3] in a, [0, 3] in b" in capsys.readouterr().out


def test_nothing_is_made_of_the_size_of_an_expert():
    from test_experts_around import Largest

    for method in ("lora", "dora"):
        torch.manual_seed(0)
        model = Mixture(Experts(16, 32, 32, way="grouped", bias=False))
        targets = [f"experts.{e}.w" for e in (1, 5, 9)]
        tokengate.patch(model, targets, method, rank=1, tau=0.1, experts=AXES)
        away(model)
        index = torch.rand(6, 16).topk(2, -1).indices
        with Largest(model) as made:
            model(torch.randn(2, 3, 32), index).square().sum().backward()
        assert 0 < made.most < 32 * 32
