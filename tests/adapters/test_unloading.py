"""`merge_and_unload`: a plain base model, or what stays gated and how often it is open."""

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence, snapshot
from torch import nn

import tokengate
from tokengate import TokenGateError
from tokengate.errors import StillGatedWarning

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


def trained(**options):
    torch.manual_seed(0)
    model = Net()
    model.head.weight.requires_grad_(False)
    tokengate.patch(model, ["q_proj", "v_proj"], rank=2, **options)
    return away_from_initialisation(model, 0.3)


def traces(model):
    """What of tokengate is on a model's modules."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}: {type(module)}"] * type(module).__module__.startswith("tokengate")
        found += [f"{name}.{key}" for key in vars(module) if "tokengate" in key]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            found += [f"{name}: {each}" for each in hooks.values()]
    return found


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("gate", [False, "threshold"])
def test_a_plain_base_model_is_left(method, gate):
    """Without gates and with gates that tau <= 0 keeps open, no data is needed."""
    model = trained(method=method, gate=gate)
    modules, parameters = [*Net().state_dict()], dict(model.named_parameters())
    with tokengate.disabled(model):
        base = model(X)
    wanted = model(X)
    assert (wanted - base).abs().max() > 1e-2
    assert traces(model)
    folding = tokengate.merge_and_unload(model)
    assert len(folding.names("merged")) == 4
    assert traces(model) == []
    assert list(model.state_dict()) == modules
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
    # The same parameter objects, trainable as they were.
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == (name != "head.weight")
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(X), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(TokenGateError, match="undo was asked of what merge_and_unload did"):
        folding.undo()
    tokengate.patch(model, ["q_proj"])  # as any base model
    tokengate.unpatch(model)
    assert traces(model) == []


def test_what_stays_gated_is_named_with_how_often_it_is_open():
    model = trained()
    layers = tokengate.layers(model)
    layers["blocks.0.v_proj"].gate.tau.data.fill_(1e9)  # always closed
    x = X.reshape(1, 20, 8)
    with tokengate.record(model, ratios=True, positions=True) as rec:
        model(x)
    ratios = rec.ratios["blocks.1.q_proj"][0].double().flatten().sort().values
    layers["blocks.1.q_proj"].gate.tau.data.fill_(ratios[4:6].mean().item())  # open at 15 of 20
    wanted = model(x)
    says = r"1 of 4 .*'blocks\.1\.q_proj' \(open at 75\.0 %"
    with pytest.warns(StillGatedWarning, match=says) as told:
        folding = tokengate.merge_and_unload(model, [x])
    assert len(told) == 1
    assert "force=" not in str(told[0].message)  # which merges nothing that is open at 75 %
    assert folding.names("kept") == ["blocks.1.q_proj"]
    assert folding.names("dropped") == ["blocks.0.v_proj"]
    assert folding.layers["blocks.1.q_proj"].sparsity == 0.25
    assert [*tokengate.layers(model)] == ["blocks.1.q_proj"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    # What is left of it is a patched model like any other.
    (layer,) = tokengate.layers(model).values()
    assert layer.gate.tau.requires_grad
    model(x).sum().backward()
    assert layer.gate.tau.grad is not None
    with tokengate.disabled(model):
        assert not torch.equal(model(x), wanted)
    tokengate.unpatch(model)
    assert traces(model) == []
    tokengate.patch(model, ["q_proj", "v_proj"])
    model.blocks[0].q_proj = nn.Linear(8, 8)
    with pytest.raises(TokenGateError, match=r"blocks\.0\.q_proj"):  # it is missed again
        tokengate.save(model, "nowhere")


@pytest.mark.parametrize("gate", ["threshold", "firm"])
def test_force_is_advised_where_it_folds_what_was_kept(gate):
    model = trained(gate=gate)
    x = X.repeat(2, 1, 1).reshape(1, 40, 8) + torch.arange(40).view(1, 40, 1) / 100
    layer = tokengate.layers(model)["blocks.0.q_proj"]
    with tokengate.record(model, ratios=True, positions=True) as rec:
        model(x)
    least = rec.ratios["blocks.0.q_proj"][0].double().flatten().sort().values
    layer.gate.threshold.data.fill_(least[:2].mean().item())  # closed at 1 of 40
    with pytest.warns(StillGatedWarning, match=r"'blocks\.0\.q_proj' .* batches and force=0\.95"):
        tokengate.merge_and_unload(model, [x])
    folding = tokengate.merge_and_unload(model, [x], force=0.95)
    assert folding.names("kept") == []


@pytest.mark.filterwarnings("error::tokengate.errors.StillGatedWarning")
def test_a_warning_made_an_error_leaves_the_model_as_it_was():
    model = trained()
    layers = tokengate.layers(model)
    layers["blocks.0.v_proj"].gate.tau.data.fill_(1e9)
    with tokengate.record(model, ratios=True, positions=True) as rec:
        model(X)
    ratios = rec.ratios["blocks.1.q_proj"][0].float()
    layers["blocks.1.q_proj"].gate.tau.data.fill_(ratios.median().item())
    before = snapshot(model)
    with pytest.raises(StillGatedWarning):
        tokengate.merge_and_unload(model, [X])
    assert snapshot(model) == before
    layers["blocks.1.q_proj"].gate.tau.data.fill_(0)
    assert tokengate.merge_and_unload(model, [X]).names("kept") == []
    assert traces(model) == []


def test_gates_that_may_close_want_data():
    model = trained(tau=0.1)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(TokenGateError, match="no data, and the gates of 'blocks"):
        tokengate.merge_and_unload(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    random = trained(gate="random")
    with pytest.raises(TokenGateError, match="no data"):
        tokengate.merge_and_unload(random)
    broken = trained(tau=0.1)
    next(iter(tokengate.layers(broken).values())).gate.tau.data.fill_(torch.nan)
    with pytest.raises(TokenGateError, match="no data"):
        tokengate.merge_and_unload(broken)


def test_what_is_no_matrix_is_named():
    model = trained(method="adapter", gate=False)
    with pytest.warns(StillGatedWarning, match=r"4 of 4 .*open at 100\.0 %.*Adapter is no matrix"):
        tokengate.merge_and_unload(model)
    assert len(tokengate.layers(model)) == 4


def test_slices_are_merged_for_good():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12))
    sizes = {"0": tokengate.Slices(q=4, k=4, v=4)}
    tokengate.patch(model, ["0.q", "0.v"], gate=False, slices=sizes)
    away_from_initialisation(model, 0.3)
    wanted = model(X)
    tokengate.merge_and_unload(model)
    assert traces(model) == []
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)


def test_of_several_adapters_none_is_merged(tmp_path):
    model = trained(gate=False)
    tokengate.save(model, tmp_path)
    tokengate.load(model, tmp_path, name="other")
    asked = "merge_and_unload was asked of a model with several adapters"
    with one_sentence(asked, "tokengate.unpatch(model, name=...)"):
        tokengate.merge_and_unload(model)
    with one_sentence("adapter_names=['other']", "tokengate.save(model, folder, name=...)"):
        tokengate.merge_and_unload(model, adapter_names=["other"])
    tokengate.save(model, tmp_path / "alone", name="other")  # which is what both say
    torch.manual_seed(0)
    alone = Net()
    tokengate.load(alone, tmp_path / "alone")
    tokengate.merge_and_unload(alone)
    torch.testing.assert_close(alone(X), model(X), rtol=1e-4, atol=1e-5)
    tokengate.unpatch(model, name="other")
    tokengate.merge_and_unload(model)
    torch.testing.assert_close(alone(X), model(X), rtol=1e-4, atol=1e-5)
    assert traces(model) == []


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_is_merged_without_autograd_can_be_trained(method):
    """Weights of inference mode never can, and nothing else would say so until then."""
    model = trained(method=method)
    with torch.inference_mode():
        tokengate.merge_and_unload(model, [X])
    assert not any(p.is_inference() for p in model.parameters())
    model.requires_grad_(True)(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
