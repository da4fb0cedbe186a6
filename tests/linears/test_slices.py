"""A fused layer patched in part: each slice a layer of its own, the others untouched."""

import copy
import functools
import pickle

import numpy as np
import pytest
import reference
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import away_from_initialisation, snapshot
from torch import nn

import tokengate
from tokengate import Slices, TokenGateError

METHODS = ["lora", "dora", "adalora", "adapter"]


def rows(slices, name):
    """The outputs of one slice, counted out."""
    found, at = [], 0
    for _ in range(slices.groups):
        for own, size in slices.sizes.items():
            if own == name:
                found += range(at, at + size)
            at += size
    return found


class Fused(nn.Module):
    """q, k and v in one layer, which is all the model does."""

    def __init__(self, slices, in_features=5, bias=True, dtype=torch.float64):
        super().__init__()
        self.qkv = nn.Linear(in_features, slices.out_features, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.qkv(x)


class Transposed(nn.Module):
    """The same in transformers' Conv1D."""

    def __init__(self, slices, in_features=5, bias=True, dtype=torch.float64):
        super().__init__()
        module = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
        self.qkv = module.Conv1D(slices.out_features, in_features).to(dtype)
        with torch.no_grad():
            self.qkv.bias.normal_()

    def forward(self, x):
        return self.qkv(x)


QKV = Slices(q=4, k=4, v=4)
BY_HEAD = Slices(groups=3, q=2, k=1, v=3)


@given(
    groups=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    shape=st.sampled_from([(), (3,), (2, 3)]),
)
def test_take_and_put(groups, sizes, shape):
    slices = Slices(groups=groups, **{f"s{i}": size for i, size in enumerate(sizes)})
    fused = torch.randn(*shape, slices.out_features)
    assert slices.out_features == groups * sum(sizes)
    new = torch.randn_like(fused)
    for name in slices.sizes:
        own = rows(slices, name)
        assert torch.equal(slices.take(fused, name), fused[..., own])
        assert torch.equal(slices.take(fused.movedim(-1, 0), name, 0), fused.movedim(-1, 0)[own])
        expected = fused.clone()
        expected[..., own] = new[..., own]
        assert torch.equal(slices.put(fused, {name: slices.take(new, name)}), expected)
        is_view = slices.take(fused, name).untyped_storage() is fused.untyped_storage()
        assert groups > 1 or is_view or slices.take(fused, name)._base is fused


@pytest.mark.parametrize("kind", [Fused, Transposed])
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=many(25), deadline=None)
@given(data=st.data())
def test_equals_the_loop(kind, method, data):
    """Every slice is the reference's layer with the slice's own rows of W0 and of the bias."""
    draw = data.draw
    slices = draw(
        st.sampled_from([QKV, BY_HEAD, Slices(q=1, k=5, v=2), Slices(groups=2, q=3, v=2)])
    )
    names = draw(st.lists(st.sampled_from(list(slices.sizes)), min_size=1, unique=True))
    gate, bias = draw(st.booleans()), draw(st.booleans())
    tau = draw(st.sampled_from([-1.0, 0.3, 1.0, 100.0]))
    torch.manual_seed(draw(st.integers(0, 100)))
    model = kind(slices, bias=bias)
    targets = [f"qkv.{name}" for name in names]
    options = {"rank": 2, "scale": 0.7, "tau": tau, "penalty": 0.1, "gate": gate}
    tokengate.patch(model, targets, method, slices={"qkv": slices}, **options)
    away_from_initialisation(model, 0.6)
    assert sorted(tokengate.layers(model)) == sorted(targets)

    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    with tokengate.record(model, positions=True) as rec:
        out = model(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    weight = model.qkv.weight if kind is Fused else model.qkv.weight.T
    W0, b = weight.detach().numpy(), model.qkv.bias
    inputs, grads = x.detach().reshape(6, 5).numpy(), grad.reshape(6, -1).numpy()
    grad_x = np.zeros((6, 5))
    for name in slices.sizes:
        own = rows(slices, name)
        ours = out.detach().reshape(6, -1)[:, own]
        if name not in names:
            grad_x += grads[:, own] @ W0[own]
            expected = inputs @ W0[own].T + (0 if b is None else b.detach().numpy()[own])
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
            continue
        layer = tokengate.layers(model)[f"qkv.{name}"]
        parameters = {n: p.detach().numpy() for n, p in layer.modification.named_parameters()}
        further = {"W0": W0[own]} if method == "dora" else {}
        if method == "adapter":
            further["activation"] = layer.modification.activation
        expected = reference.layer(
            inputs,
            W0[own],
            None if b is None else b.detach().numpy()[own],
            parameters,
            functools.partial(getattr(reference, method), p=parameters, scale=0.7, **further),
            tau if gate else None,
            0.1,
            grads[:, own],
        )
        np.testing.assert_allclose(ours, expected["h"], rtol=1e-9, atol=1e-9)
        assert rec.positions[f"qkv.{name}"][0].flatten().tolist() == expected["S"]
        for own_name, parameter in layer.modification.named_parameters():
            np.testing.assert_allclose(parameter.grad, expected[own_name], rtol=1e-8, atol=1e-8)
        if gate:
            np.testing.assert_allclose(layer.gate.tau.grad, expected["tau"], rtol=1e-8, atol=1e-8)
        grad_x += expected["x"]
    np.testing.assert_allclose(x.grad.reshape(6, 5), grad_x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slices", [QKV, BY_HEAD], ids=["contiguous", "by head"])
@pytest.mark.parametrize("method", METHODS)
def test_no_op_at_first_and_the_others_bit_for_bit(method, slices, dtype):
    model = Fused(slices, dtype=dtype)
    x = torch.randn(2, 6, 5).to(dtype)
    base, before = model(x), snapshot(model)
    tokengate.patch(model, ["qkv.q", "qkv.v"], method, slices={"qkv": slices}, rank=2, tau=0.4)
    assert torch.equal(model(x), base)
    away_from_initialisation(model, 0.8)
    changed = model(x)
    with tokengate.record(model, positions=True) as rec:
        model(x)
    assert torch.equal(slices.take(changed, "k"), slices.take(base, "k"))
    for name in ("q", "v"):
        is_open = rec.positions[f"qkv.{name}"][0]
        ours, unchanged = slices.take(changed, name), slices.take(base, name)
        assert not torch.equal(ours, unchanged)
        assert torch.equal(ours[~is_open], unchanged[~is_open])
    with tokengate.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), changed)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), changed)
        assert other.qkv.q.fused is other.qkv
    tokengate.unpatch(model)
    assert torch.equal(model(x), base)
    assert snapshot(model) == before


def test_names_and_keys():
    model = Fused(QKV)
    keys = list(model.state_dict())
    tokengate.patch(model, ["qkv.v"], slices={"qkv": QKV})
    assert isinstance(model.qkv, nn.Linear)
    assert list(model.state_dict()) == [
        *keys,
        "qkv.v.modification.A",
        "qkv.v.modification.B",
        "qkv.v.gate.tau",
    ]
    layer = tokengate.layers(model)["qkv.v"]
    assert (layer.in_features, layer.out_features) == (5, 4)
    assert torch.equal(layer.weight, model.qkv.weight[8:])
    assert torch.equal(layer.bias, model.qkv.bias[8:])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in model.state_dict() if "v." in n and "qkv.v." in n
    }


def test_slices_of_one_layer_at_two_times_and_with_two_methods():
    model, x = Fused(QKV), torch.randn(3, 5, dtype=torch.float64)
    before, base = snapshot(model), model(x)
    tokengate.patch(model, ["qkv.q"], "lora", slices={"qkv": QKV})
    tokengate.patch(model, ["qkv.k"], "dora", slices={"qkv": QKV})
    assert torch.equal(model(x), base)
    kinds = [type(layer.modification).__name__ for layer in tokengate.layers(model).values()]
    assert kinds == ["LoRA", "DoRA"]
    tokengate.verify(model, x)
    tokengate.unpatch(model)
    assert snapshot(model) == before


def test_more_slices_of_a_layer_that_is_patched_in_part():
    """It stays divided as it is: nobody needs to say so again, and known layouts do not count."""
    model, x = Fused(QKV), torch.randn(3, 5, dtype=torch.float64)
    tokengate.patch(model, ["qkv.q"], slices={"qkv": QKV})
    tokengate.patch(model, ["qkv.k"])
    assert list(tokengate.layers(model)) == ["qkv.q", "qkv.k"]
    model(x)

    class Known(Fused):
        """Named as a class of timm, whose qkv is known."""

        def forward(self, x):
            return self.qkv(x)

    Known.__module__, Known.__qualname__ = "timm.layers.attention", "Attention"
    model = Known(QKV)
    tokengate.patch(model, ["qkv.a"], slices={"qkv": Slices(a=2, b=10)})
    before = snapshot(model)
    with pytest.raises(TokenGateError, match="matches no module"):
        tokengate.patch(model, ["qkv.k"])
    assert snapshot(model) == before
    tokengate.patch(model, ["qkv.b"])
    model(x)
    tokengate.patch(tokengate.unpatch(model), ["qkv.k"])
    model(x)


def test_a_layer_that_its_rule_does_not_fit_is_not_divided():
    class Known(Fused):
        num_heads = 24

        def forward(self, x):
            return self.qkv(x)

    Known.__module__, Known.__qualname__ = "timm.models.tiny_vit", "Attention"
    model = tokengate.patch(Known(QKV), ["qkv"])
    assert list(tokengate.layers(model)) == ["qkv"]


def test_what_a_layer_has_under_other_names_stays():
    model = Fused(QKV)
    model.qkv.slices = "its own"
    tokengate.patch(model, ["qkv.q"], slices={"qkv": QKV})
    assert copy.deepcopy(model).qkv.slices == model.qkv.slices == "its own"
    assert tokengate.unpatch(model).qkv.slices == "its own"


def test_reached_while_disabled():
    """As a layer that is patched as a whole; pytest makes the warning an error."""
    model, x = Fused(BY_HEAD), torch.randn(3, 5, dtype=torch.float64)
    base = model(x)
    tokengate.patch(model, ["qkv.q"], slices={"qkv": BY_HEAD})
    away_from_initialisation(model)
    with tokengate.disabled(model):
        assert torch.equal(model(x), base)


def test_unreached_slices_name_who_should_have_called_the_layer():
    class Idle(Fused):
        def forward(self, x):
            return x

    model = tokengate.patch(Idle(QKV), ["qkv.q"], slices={"qkv": QKV})
    with pytest.raises(TokenGateError, match=r"'qkv\.q' of Idle was patched but never called"):
        tokengate.verify(model, torch.randn(3, 5, requires_grad=True))


def test_options_and_report_by_slice():
    model = nn.ModuleDict({"layers": nn.ModuleList([Fused(QKV), Fused(QKV)])})
    tokengate.patch(
        model, ["qkv.q", "*.qkv.v"], slices={"qkv": QKV}, rank={"*.q": 3, "*": 1}, tau=100.0
    )
    assert [m.modification.rank for m in tokengate.layers(model).values()] == [3, 1, 3, 1]
    away_from_initialisation(model)
    with tokengate.record(model) as rec:
        for layer in model["layers"]:
            layer(torch.randn(2, 3, 5, dtype=torch.float64))
    table = rec.report().table
    assert (table.rows, table.columns) == (["0", "1"], ["q", "v"])
    assert table.values == [[1.0, 1.0], [1.0, 1.0]]


def test_norms_of_dora_follow_the_fused_weight():
    model, x = Fused(BY_HEAD), torch.randn(3, 5, dtype=torch.float64)
    tokengate.patch(model, ["qkv.k"], "dora", slices={"qkv": BY_HEAD})
    away_from_initialisation(model)
    before = model.qkv.k.modification.row_norms(model.qkv.k)
    with torch.no_grad():
        model.qkv.weight[rows(BY_HEAD, "q")] *= 2
    assert torch.equal(model.qkv.k.modification.row_norms(model.qkv.k), before)
    with torch.no_grad():
        model.qkv.weight[rows(BY_HEAD, "k")] *= 2
    assert not torch.allclose(model.qkv.k.modification.row_norms(model.qkv.k), before)
    model(x)


def test_padding_counts_for_slices():
    class Masked(Fused):
        def forward(self, x, attention_mask=None):
            return self.qkv(x)

    model = Masked(BY_HEAD)
    tokengate.patch(model, ["qkv.q"], slices={"qkv": BY_HEAD}, penalty=1.0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with tokengate.record(model) as rec:
        model(x, attention_mask=mask).sum().backward()
    assert rec.report().modules["qkv.q"].positions == 3
    assert model.qkv.q.gate.tau.grad.item() == -3.0


def test_compiled():
    model = Fused(BY_HEAD, dtype=torch.float32)
    tokengate.patch(model, ["qkv.q", "qkv.v"], slices={"qkv": BY_HEAD}, tau=0.5, penalty=0.1)
    away_from_initialisation(model)
    x = torch.randn(2, 3, 5)
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == 6
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, value)


def test_a_plain_name_means_layers_only():
    """`gate` of an MLP is no slice called gate, unless one names its layer."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.gate_up = nn.Linear(4, 4), nn.Linear(4, 8)

        def forward(self, x):
            return self.gate_up(self.gate(x))

    layout = {"gate_up": Slices(gate=4, up=4)}
    model = tokengate.patch(Mlp(), ["gate"])
    assert list(tokengate.layers(model)) == ["gate"]
    model = tokengate.patch(Mlp(), ["gate_up.gate"], slices=layout)
    assert list(tokengate.layers(model)) == ["gate_up.gate"]
    model(torch.randn(2, 4))
    # A glob that matches the layer and its slices means the layer.
    model = tokengate.patch(Fused(QKV), ["*qkv*"])
    assert list(tokengate.layers(model)) == ["qkv"]
    model = tokengate.patch(Fused(QKV), lambda n, m: n.endswith(".v"), slices={"qkv": QKV})
    assert list(tokengate.layers(model)) == ["qkv.v"]
    model = tokengate.patch(Fused(QKV), "*.q", slices={"qkv": QKV})
    assert list(tokengate.layers(model)) == ["qkv.q"]


@pytest.mark.parametrize(
    ("targets", "options", "says"),
    [
        (["qkv.q"], {}, "how 'qkv' is divided is not known here, so if 'q' is a part of it, pass"),
        (["qkv", "qkv.q"], {"slices": {"qkv": QKV}}, "names 'qkv' and its slice 'qkv.q'"),
        (["qkv"], {"slices": {"qkv": QKV}}, "no slice of it is a target: name one, e.g. 'qkv.q'"),
        (["qkv"], {"slices": {"qkv": QKV}, "exclude": ["qkv.k"]}, "'qkv.k', a slice of 'qkv'"),
        (
            ["qkv"],
            {"slices": {"qkv": QKV}, "exclude": "*.k"},
            "exclude matches 'qkv.k'.* nothing of",
        ),
        (
            ["qkv"],
            {"slices": {"qkv": QKV}, "exclude": lambda n, m: n == "qkv.v"},
            "matches 'qkv.v'",
        ),
        (["qkv.q"], {"slices": {"qkv": QKV}, "exclude": ["qkv"]}, "only what exclude= leaves out"),
        (["qkv.q"], {"slices": {"qkv": Slices(q=3)}}, "is 3 outputs, but it has 12: correct"),
        (["qkv.q"], {"slices": {"kv": QKV}}, "matches no linear layer of this Fused"),
        (["qkv.q"], {"slices": {"qkv": {"q": 4}}}, "pass tokengate.Slices"),
        (["qkv.q"], {"slices": QKV}, "pass a dict from names of layers"),
        (["qkv.bias"], {"slices": {"qkv": Slices(bias=12)}}, "has already: choose another name"),
        (["qkv.w"], {"slices": {"qkv": QKV}}, "matches no module of this Fused"),
        (["qkv.q"], {"slices": {"qkv": QKV}, "train": ["qkv"]}, "both a target and named by train"),
    ],
)
def test_refused(targets, options, says):
    model = Fused(QKV)
    before = snapshot(model)
    with pytest.raises(TokenGateError, match=says) as error:
        tokengate.patch(model, targets, **options)
    assert str(error.value).endswith(".")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        (["qkv.q"], ["qkv.q"], "is patched already"),
        (["qkv.q"], ["qkv"], "is patched in part already"),
        (["qkv"], ["qkv.q"], "a slice of 'qkv', which is patched as a whole"),
    ],
)
def test_refused_when_patched(first, then, says):
    model = Fused(QKV)
    tokengate.patch(model, first, slices={"qkv": QKV} if "." in first[0] else None)
    with pytest.raises(TokenGateError, match=says):
        tokengate.patch(model, then, slices={"qkv": QKV} if "." in then[0] else None)


def test_refused_with_other_slices_than_before():
    model = Fused(QKV)
    tokengate.patch(model, ["qkv.q"], slices={"qkv": QKV})
    with pytest.raises(TokenGateError, match="patched in part by Slices"):
        tokengate.patch(model, ["qkv.k"], slices={"qkv": Slices(q=4, v=4, k=4)})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no sizes"),
        ({"q": 0}, "q"),
        ({"q": 2.0}, "q"),
        ({"groups": 0, "q": 2}, "groups"),
        ({"q.k": 2}, "the name 'q.k'"),
        ({"": 2}, "the name ''"),
        ({"_q": 2}, "the name '_q'"),
    ],
)
def test_slices_check_their_numbers(options, says):
    with pytest.raises(TokenGateError, match=says):
        Slices(**options)
