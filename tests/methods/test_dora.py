"""DoRA's row norms: never stale, and never infinite."""

import contextlib
import copy

import pytest
import torch
from models import Net, away_from_initialisation
from torch import nn
from torch.nn import functional as F

import tokengate
from tokengate.errors import DifferentBaseWarning


def wanted(layer, x):
    """The layer's output from the definition, with the norms of what W0 is now."""
    m = layer.modification
    W0 = layer.weight.double()
    V = W0 + m.scale * m.B.double() @ m.A.double()
    merged = (m.magnitude.double() / V.norm(dim=1)).unsqueeze(1) * V
    return F.linear(x.double(), merged, layer.bias.double())


def other_base(warns=True):
    """What a trained magnitude says of a base that is loaded after it."""
    if not warns:
        return contextlib.nullcontext()
    return pytest.warns(DifferentBaseWarning, match="W0 was loaded after its magnitude")


@pytest.fixture
def layer():
    layer = tokengate.patch(nn.Linear(6, 5), "all-linear", "dora", rank=2)
    away_from_initialisation(layer)
    layer(torch.randn(3, 6))
    return layer


def load(layer):
    layer.load_state_dict({"weight": torch.randn(5, 6)}, strict=False)


def load_assign(layer):
    layer.load_state_dict({"weight": torch.randn(5, 6)}, strict=False, assign=True)


def scale_in_place(layer):
    with torch.no_grad():
        layer.weight[2].mul_(3)


def round_trip_through_16_bits(layer):
    # Back in float32, and perhaps at the old address, but rounded.
    layer.to(torch.float16).to(torch.float32)


def to_double(layer):
    layer.double()


def another_parameter(layer):
    layer.weight = nn.Parameter(torch.randn(5, 6), requires_grad=False)


def data(layer):
    layer.weight.data = torch.randn(5, 6)


def past_setattr(layer):
    layer._parameters["weight"] = nn.Parameter(torch.randn(5, 6), requires_grad=False)


def data_minus_delta(layer):
    layer.weight.data -= torch.rand(5, 6)


def through_numpy(layer):
    layer.weight.detach().numpy()[1] = 3


def without_a_version(layer):  # as fully_shard writes its unsharded weights
    with torch.autograd._unsafe_preserve_version_counter(layer.weight), torch.no_grad():
        layer.weight.mul_(torch.arange(1.0, 6.0)[:, None])


def written_through_data(layer):
    layer.weight.data.mul_(torch.arange(1.0, 6.0)[:, None])


@pytest.mark.parametrize(
    "change",
    [
        load,
        load_assign,
        scale_in_place,
        round_trip_through_16_bits,
        to_double,
        another_parameter,
        past_setattr,
        data,
        data_minus_delta,
        through_numpy,
        without_a_version,
        written_through_data,
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_stale_norm(layer, change, training):
    layer.train(training)
    before = layer.weight.clone()
    change(layer)
    x = torch.randn(3, 6, dtype=layer.weight.dtype)
    assert layer.weight.dtype != before.dtype or not torch.equal(layer.weight, before)
    with other_base(change in (load, load_assign)):
        found = layer(x)
    torch.testing.assert_close(found.double(), wanted(layer, x), rtol=1e-5, atol=1e-5)


def test_swapped_tensors(layer, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    load(layer)
    x = torch.randn(3, 6)
    with other_base():
        found = layer(x)
    torch.testing.assert_close(found, wanted(layer, x).float())


def test_another_summation_of_the_norms_is_no_change():
    """Other devices and compilers give another last digit; M is 0 all the same."""
    layer = nn.Linear(300, 5)
    x = torch.randn(3, 300)
    base = layer(x)
    tokengate.patch(layer, "all-linear", "dora")
    m = layer.modification
    with torch.no_grad():
        m.magnitude.mul_(1 + 2**-23)
    assert torch.equal(layer(x), base)
    layer(x).sum().backward()
    assert m.magnitude.grad.all()  # it can still be trained away from there
    with torch.no_grad():
        m.B.fill_(1e-3)
    with torch.no_grad():
        m.B.fill_(0.0)
        m.magnitude.mul_(1.001)
    assert not torch.equal(layer(x), base)


def test_a_weight_that_has_no_rows_to_measure():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        tokengate.TokenGateError, match=r"DoRA reads W0, .* torch\.int8 here: dequan"
    ):
        tokengate.patch(layer, "all-linear", "dora")


def test_patching_again_takes_the_new_norms():
    layer = tokengate.patch(nn.Linear(6, 5), "all-linear", "dora")
    before = layer.modification.magnitude.clone()
    tokengate.unpatch(layer)
    with torch.no_grad():
        layer.weight.mul_(3)
    x = torch.randn(3, 6)
    base = layer(x)
    tokengate.patch(layer, "all-linear", "dora")
    assert torch.equal(layer(x), base)
    torch.testing.assert_close(layer.modification.magnitude, 3 * before)


def test_a_copy_has_its_own_norms(layer):
    other = copy.deepcopy(layer)
    scale_in_place(other)
    x = torch.randn(3, 6)
    torch.testing.assert_close(other(x), wanted(other, x).float())
    torch.testing.assert_close(layer(x), wanted(layer, x).float())
    assert not torch.equal(layer(x), other(x))


def test_the_norm_after_inference_mode_and_from_inference_weights(layer):
    x = torch.randn(3, 6)
    scale_in_place(layer)
    with torch.inference_mode():
        inside = layer(x)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), inside)
    with torch.inference_mode():
        other = nn.Linear(6, 5)
    tokengate.patch(other, "all-linear", "dora")
    away_from_initialisation(other)
    with torch.inference_mode():
        torch.testing.assert_close(other(x), wanted(other, x).float())
        other.weight.mul_(torch.arange(1.0, 6.0)[:, None])
        torch.testing.assert_close(other(x), wanted(other, x).float())


def test_rows_that_cancel_stay_finite():
    layer = tokengate.patch(nn.Linear(4, 3, dtype=torch.float64), "all-linear", "dora", rank=3)
    m = layer.modification
    with torch.no_grad():
        m.A[:] = torch.eye(3, 4)
        layer.weight[:, 3] = 0
        m.B[:] = -layer.weight[:, :3] / m.scale  # W0 + scale B A = 0, up to rounding
        m.B[1] *= 2
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    norms = m.row_norms(layer)
    assert (norms[[0, 2]] < 1e-6).all()
    assert norms[1] > 0.1
    with torch.no_grad():
        m.B[[0, 2]] = 0
        layer.weight[[0, 2]] = 0
    assert torch.equal(m.row_norms(layer)[[0, 2]], torch.zeros(2, dtype=torch.float64))
    h = layer(x)
    h.sum().backward()
    assert h.isfinite().all()
    assert m.magnitude.grad.isfinite().all()


def test_c_minus_1_is_not_lost_to_rounding():
    """c = 1 + 2^-20 differs from 1 by 8 units in the last place of float32; M must be 2^-20 w."""
    layer = tokengate.patch(nn.Linear(8, 4), "all-linear", "dora", gate=False)
    with torch.no_grad():
        layer.modification.magnitude.mul_(1 + 2**-20)
    w = torch.randn(16, 4)
    gain = layer.modification.factors(torch.randn(16, 8), w, layer).gain
    torch.testing.assert_close(gain, torch.full((4,), 2.0**-20), rtol=0.1, atol=0)
    assert gain.isfinite().all()


def test_bias_is_not_scaled():
    layer = tokengate.patch(nn.Linear(4, 3), "all-linear", "dora")
    with torch.no_grad():
        layer.bias.fill_(100.0)
        layer.modification.magnitude.mul_(2)
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), 2 * F.linear(x, layer.weight) + 100)


def test_apart_from_its_layer_it_says_what_it_wants():
    layer = tokengate.patch(nn.Linear(4, 3), "all-linear", "dora")
    with pytest.raises(tokengate.TokenGateError, match="DoRA was called without its base layer"):
        layer.modification(torch.randn(2, 4), torch.randn(2, 3))


def test_meta_device_and_back():
    with torch.device("meta"):
        model = Net()
    tokengate.patch(model, ["q_proj"], "dora")
    with torch.device("meta"):
        assert model(torch.randn(2, 3, 8)).is_meta
    model.to_empty(device="cpu")
    state = tokengate.patch(Net(), ["q_proj"], "dora").state_dict()
    model.load_state_dict(state)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, state[name])
    assert model(torch.randn(2, 3, 8)).isfinite().all()


def model_and_base(count=3):
    """Of so many modules, whose first is a layer."""
    torch.manual_seed(0)
    layers = [lambda: nn.Linear(8, 8), nn.Tanh, lambda: nn.Linear(8, 2)][:count]
    model, base = (nn.Sequential(*[make() for make in layers]) for _ in range(2))
    return tokengate.patch(model, "all-linear", "dora", rank=2), base


def by_load_state_dict(model, base):
    model.load_state_dict(base.state_dict(), strict=False)


def by_assigning(model, base):
    state = {n: t.clone() for n, t in base.state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)


def by_data(model, base):
    for name, parameter in base.named_parameters():
        model.get_parameter(name).data.copy_(parameter)


def by_other_parameters(model, base):
    for name, parameter in base.named_parameters():
        owner, last = name.rsplit(".", 1)
        model.get_submodule(owner)._parameters[last] = nn.Parameter(
            parameter.detach().clone(), requires_grad=False
        )


LOADINGS = [by_load_state_dict, by_assigning, by_data, by_other_parameters]


@pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")
@pytest.mark.parametrize("loading", LOADINGS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("forward", [True, False], ids=["after a forward", "before"])
def test_patched_before_the_base_is_loaded(loading, training, forward):
    model, base = model_and_base()
    x = torch.randn(4, 8)
    if forward:
        assert not torch.allclose(model(x), base(x), atol=0.01)
    loading(model, base)
    model.train(training)
    assert torch.equal(model(x), base(x))
    for name, layer in tokengate.layers(model).items():
        norms = base.get_submodule(name).weight.norm(dim=1)
        torch.testing.assert_close(layer.modification.magnitude, norms, rtol=1e-6, atol=0)
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    other, _ = model_and_base()  # patched after its base was loaded
    tokengate.unpatch(other).load_state_dict(base.state_dict())
    tokengate.patch(other, "all-linear", "dora", rank=2)
    for name, layer in tokengate.layers(other).items():
        layer.modification.load_state_dict(model.get_submodule(name).modification.state_dict())
    assert not torch.allclose(model(x), base(x), atol=0.01)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("loading", [by_load_state_dict, by_assigning])
def test_a_trained_one_keeps_its_magnitude_and_says_so_once(loading):
    model, base = model_and_base()
    away_from_initialisation(model)
    x = torch.randn(4, 8)
    model(x)
    magnitude = model[0].modification.magnitude.clone()
    loading(model, base)
    with other_base() as caught:
        model(x)
    assert len(caught) == 2  # layers
    model(x)
    assert torch.equal(model[0].modification.magnitude, magnitude)
    loading(model, base)  # the same once more
    model(x)


@pytest.mark.parametrize("order", ["base first", "adapter first", "together"])
def test_a_loaded_magnitude_belongs_to_the_base_that_is_loaded(order):
    model, base = model_and_base()
    trained, _ = model_and_base()
    tokengate.unpatch(trained).load_state_dict(base.state_dict())
    tokengate.patch(trained, "all-linear", "dora", rank=2)
    away_from_initialisation(trained)
    state = trained.state_dict()
    own = {n: t for n, t in state.items() if "modification" in n or "gate" in n}
    parts = [state]
    if order != "together":
        parts = [base.state_dict(), own]
    for part in parts if order != "adapter first" else reversed(parts):
        model.load_state_dict(part, strict=False)
    x = torch.randn(4, 8)
    assert not torch.allclose(model(x), base(x), atol=0.01)
    assert torch.equal(model(x), trained(x))


@pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")
@pytest.mark.parametrize("loading", LOADINGS)
def test_compiled_it_follows_too(loading):
    torch._dynamo.reset()
    model, base = model_and_base(1)  # compiled thrice
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)
    compiled(x)
    by_data(model, model_and_base(1)[1])
    model[0].weight.data.mul_(2)
    with torch.inference_mode():
        model(x)
    loading(model, base)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), base(x))
    torch.testing.assert_close(compiled(x), base(x))
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.01))
    compiled(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(compiled(x), base(x), atol=0.01)
    torch.testing.assert_close(compiled(x), model(x))
    norms = base[0].weight.norm(dim=1)
    assert not torch.equal(model[0].modification.magnitude, norms)
    torch.testing.assert_close(model[0].modification.magnitude, norms, rtol=0.2, atol=0)


def test_from_the_meta_device_it_waits_for_the_base():
    _, base = model_and_base()
    with torch.device("meta"):
        model, _ = model_and_base()
    model.to_empty(device="cpu")
    assert model[0].modification.magnitude.isnan().all()  # not known yet, and seen
    by_load_state_dict(model, base)
    x = torch.randn(4, 8)
    assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model[0].modification.magnitude, base[0].weight.norm(dim=1))
    assert model[0].modification.A.abs().max() <= (6 / 8 / 6 * 3) ** 0.5  # kaiming's bound


def test_what_functional_call_is_given_is_left_as_it_is():
    model, base = model_and_base()
    x = torch.randn(4, 8)
    given = {n: p.detach().clone() for n, p in model.named_parameters()}
    given |= {n: p.detach().clone() for n, p in base.named_parameters()}
    before = {n: t.clone() for n, t in given.items()}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, given, (x,)), base(x))
    assert all(torch.equal(given[n], before[n]) for n in given)


def test_a_sharded_magnitude_cannot_follow(monkeypatch):
    model, base = model_and_base()
    monkeypatch.setattr("tokengate.methods.dora.is_sharded", lambda tensor: True)
    by_load_state_dict(model, base)
    with pytest.raises(tokengate.TokenGateError, match=r"after the model was sharded.*fully_shard"):
        model(torch.randn(4, 8))


def test_a_base_that_is_loaded_before_any_forward_is_saved_with_its_own_norms(tmp_path):
    model = tokengate.patch(Net(), ["fc1"], method="dora", rank=2)
    torch.manual_seed(5)
    other = {name: torch.randn_like(value) for name, value in Net().state_dict().items()}
    stale = model.blocks[0].fc1.modification.magnitude.detach().clone()
    model.load_state_dict(other, strict=False)
    tokengate.save(model, tmp_path)
    base = Net()
    base.load_state_dict(other)
    tokengate.load(base, tmp_path)
    norms = base.blocks[0].fc1.weight.norm(dim=1)
    assert (stale - norms).abs().max() > 0.1
    torch.testing.assert_close(base.blocks[0].fc1.modification.magnitude.detach(), norms)


def test_a_base_that_is_loaded_after_its_adapter_is_no_other_one(tmp_path):
    x = torch.randn(3, 5, 8)
    torch.manual_seed(5)
    trained = away_from_initialisation(tokengate.patch(Net(), ["fc1"], method="dora", rank=2))
    wanted = trained(x)
    own = {n: p for n, p in trained.state_dict().items() if "modification" not in n}
    own = {n: p for n, p in own.items() if "gate" not in n}
    tokengate.save(trained, tmp_path)
    torch.manual_seed(6)
    model = Net()
    tokengate.load(model, tmp_path)
    model.load_state_dict(own, strict=False)
    torch.testing.assert_close(model(x), wanted)
