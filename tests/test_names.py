"""What wraps a model, or a part of it, is in no name: of layers, files, patterns, reports."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Net
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.optim.swa_utils import AveragedModel

import tokengate
from tokengate.adapters.folder import read_adapter
from tokengate.names import inside, named_children, named_modules, named_parameters, submodule

X = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)
TARGETS = ["blocks.0.q_proj", "blocks.0.fc1", "blocks.1.q_proj", "blocks.1.fc1"]


def compiled(module):
    made = torch.compile(module, backend="eager")
    return made if isinstance(made, nn.Module) else module  # of what is compiled, no module


def averaged(module):
    return AveragedModel(module)


# Around the whole model or around any of its modules.
AROUND = {
    "averaged": averaged,
    "checkpointed": checkpoint_wrapper,
    "compiled": compiled,
    "offloaded": offload_wrapper,
    "parallel": nn.DataParallel,
}
PLACES = ["", "blocks", "blocks.0", "blocks.0.q_proj", "head"]


def put(model, name, wrap):
    """`model` with a wrapper around the module of this name, or around what wraps that."""
    if not name:
        return wrap(model)
    owner, _, own = name.rpartition(".")
    holder = submodule(model, owner)
    setattr(holder, own, wrap(getattr(holder, own)))
    return model


def fresh():
    torch.manual_seed(0)
    return Net()


def patched(seed=None):
    model = tokengate.patch(fresh(), ["q_proj", "fc1"], rank=2, tau=0.3, train=["head"])
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.shape != (1,):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def output(model):
    with torch.no_grad():
        return inside(model)(X)


def plain(model):
    """The values by own name, whatever is around."""
    return {name: p.detach().clone() for name, p in named_parameters(model)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", AROUND)
def test_files_are_the_same_with_and_without_a_wrapper(tmp_path, kind, place):
    run = put(patched(seed=1), place, AROUND[kind])
    assert [n for n, _ in run.named_modules()] != [n for n, _ in named_modules(run)]
    assert list(tokengate.layers(run)) == TARGETS
    tokengate.save(run, tmp_path / "wrapped")
    tokengate.save(patched(seed=1), tmp_path / "plain")
    tensors = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("wrapped", "plain")]
    assert equal(*tensors)
    one, other = (read_adapter(tmp_path / name).config for name in ("wrapped", "plain"))
    assert one == other

    expected, model = plain(patched(seed=1)), fresh()
    tokengate.load(model, tmp_path / "wrapped")
    assert equal(plain(model), expected)
    other = put(patched(seed=2), place, AROUND[kind])
    assert not equal(plain(other), expected)
    tokengate.load(other, tmp_path / "plain")
    assert equal(plain(other), expected)


@given(
    st.lists(st.tuples(st.sampled_from(list(AROUND)), st.sampled_from(list(PLACES))), max_size=4)
)
def test_any_wrappers_anywhere(chosen):
    model = patched(seed=1)
    names, parameters = [n for n, _ in model.named_modules()], plain(model)
    for kind, place in chosen:
        model = put(model, place, AROUND[kind])
    assert [n for n, _ in named_modules(model)] == names
    assert equal(plain(model), parameters)
    for name, module in named_modules(model):
        assert submodule(model, name) is module
        assert type(module) is type(inside(module))


def test_without_wrappers_they_are_torch_s():
    model = patched()
    model.again = model.blocks[0]  # under two names
    for once in (True, False):
        theirs = list(model.named_modules(remove_duplicate=once))
        assert list(named_modules(model, once)) == theirs
        own = list(named_parameters(model, once))
        assert [n for n, _ in own] == [n for n, _ in model.named_parameters(remove_duplicate=once)]
    assert len(list(named_modules(model, False))) > len(list(named_modules(model)))
    assert dict(named_children(model)) == dict(model._modules)


class Own(nn.Module):
    """A model of the user's, whose child happens to be called as DataParallel's."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(8, 8)
        self._orig_mod = nn.Linear(8, 8)

    def forward(self, x):
        return self._orig_mod(self.module(x))


def test_a_child_called_module_is_no_wrapper(tmp_path):
    torch.manual_seed(0)
    model = tokengate.patch(Own(), ["module", "_orig_mod"], rank=2)
    assert list(tokengate.layers(model)) == ["module", "_orig_mod"]
    tokengate.save(model, tmp_path)
    other = Own()
    tokengate.load(other, tmp_path)
    assert list(tokengate.layers(nn.DataParallel(other))) == ["module", "_orig_mod"]


@pytest.mark.parametrize("kind", ["checkpointed", "offloaded", "averaged"])
def test_a_wrapped_model_is_patched_by_its_own_names(tmp_path, kind):
    wrap = AROUND[kind]
    place = "" if kind == "averaged" else "blocks.0"
    asked = {"exclude": ["blocks.1"], "rank": {"blocks.0.*": 3}, "train": ["blocks.1.norm"]}
    expected = tokengate.patch(fresh(), ["blocks.*.fc1"], **asked)
    model = tokengate.patch(put(fresh(), place, wrap), ["blocks.*.fc1"], **asked)
    assert list(tokengate.layers(model)) == list(tokengate.layers(expected)) == ["blocks.0.fc1"]
    tokengate.save(model, tmp_path)
    other = fresh()
    tokengate.load(other, tmp_path)
    trained = {n for n, p in other.named_parameters() if p.requires_grad}
    assert {"blocks.1.norm.weight", "blocks.0.fc1.modification.A"} <= trained

    # A plain adapter, into a model that has the wrapper and no patch yet.
    tokengate.save(expected, tmp_path / "plain")
    bare = put(fresh(), place, wrap)
    tokengate.load(bare, tmp_path / "plain")
    assert list(tokengate.layers(bare)) == ["blocks.0.fc1"]


def test_what_is_measured_is_under_own_names(tmp_path):
    batches = [X, -X]
    run = AveragedModel(put(patched(seed=1), "blocks.0", checkpoint_wrapper))
    model = patched(seed=1)
    with tokengate.record(run) as theirs, tokengate.record(model) as ours:
        run(X), model(X)
    one, other = theirs.report(), ours.report()
    assert one.to_dict() == other.to_dict()
    assert 0 < one.sparsity < 1
    assert tokengate.select(one, fraction=0.5) == tokengate.select(other, fraction=0.5)
    assert list(tokengate.calibrate(run, batches)) == TARGETS
    assert list(tokengate.modification_norms(run, batches).relative) == TARGETS
    tokengate.History(run).save(tmp_path / "history.json")
    assert list(tokengate.History.load(tmp_path / "history.json", model).taus) == TARGETS
    mask = torch.ones(2, 5, dtype=torch.bool)
    with tokengate.restrict(run, {"blocks.0.*": ~mask}), torch.no_grad():
        restricted = run(X)
    with tokengate.restrict(patched(seed=1), {"blocks.0.*": mask}):
        pass
    assert not torch.equal(restricted, output(run))
    tokengate.save(run, tmp_path / "b")
    tokengate.load(run, tmp_path / "b", name="second")
    with tokengate.use(run, "second"):
        assert list(tokengate.layers(run)) == TARGETS


def test_folding_a_wrapped_model_is_undone():
    model = patched(seed=1)
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.gate.tau.fill_(-1)
    run = AveragedModel(put(model, "blocks.0", checkpoint_wrapper))
    before = output(run)
    folding = tokengate.fold(run, [X])
    assert folding.names("merged") == TARGETS
    assert list(tokengate.layers(run)) == []
    folding.undo()
    assert list(tokengate.layers(run)) == TARGETS
    assert torch.equal(output(run), before)


def test_unpatch_knows_what_was_trained_before_it_was_wrapped():
    model = fresh()
    model.head.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    tokengate.patch(model, ["q_proj"])
    assert before != {n: p.requires_grad for n, p in named_parameters(model) if n in before}
    put(model, "blocks.1", checkpoint_wrapper)
    tokengate.unpatch(model)
    assert before == {n: p.requires_grad for n, p in named_parameters(model)}


def test_timm_s_averaged_models(tmp_path):
    timm = pytest.importorskip("timm.utils", reason="the timm extra is not installed")
    for kind in (timm.ModelEmaV2, timm.ModelEmaV3):
        ema = kind(patched(seed=1), decay=0.5)
        ema.update(patched(seed=2))
        tokengate.save(ema, tmp_path / kind.__name__)
        model = fresh()
        tokengate.load(model, tmp_path / kind.__name__)
        assert torch.equal(output(model), ema.module(X))
        assert not torch.equal(output(model), output(patched(seed=1)))


def test_peft_s_files_have_own_names(tmp_path):
    peft = pytest.importorskip("tokengate.integrations.hf_peft")

    def open_model():
        model = patched(seed=1)
        for layer in tokengate.layers(model).values():
            nn.init.constant_(layer.gate.tau, -1.0)
        return model

    run = compiled(put(open_model(), "blocks.0", checkpoint_wrapper))
    peft.export_peft(run, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.blocks.0.q_proj.lora_A.weight" in keys
    model = fresh()
    put(model, "blocks.1", checkpoint_wrapper)
    peft.import_peft(model, tmp_path, strict=True)
    assert torch.equal(output(model), output(open_model()))
