"""fold of slices of fused layers and of a split attention's projections, by the rows they own."""

import copy
import pickle

import pytest
import torch
from models import away_from_initialisation, snapshot
from test_slices import BY_HEAD, QKV, Fused, Transposed, rows
from torch import nn

import tokengate
from tokengate import TokenGateError
from tokengate.integrations.attention import merge_attention, split_attention

DATA = [
    torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    for i in range(3)
]


def mixed(kind=Fused, slices=QKV, method="dora"):
    """q is open everywhere, k in part, v nowhere."""
    torch.manual_seed(0)
    model = kind(slices).eval()
    targets = ["qkv.q", "qkv.k", "qkv.v"]
    tokengate.patch(model, targets, method, rank=2, slices={"qkv": slices})
    away_from_initialisation(model, 0.4)
    tokengate.calibrate(model, DATA, 0.5)
    model.qkv.q.gate.tau.data.zero_()
    model.qkv.v.gate.tau.data.fill_(1e6)
    return model


def outputs(model):
    with torch.no_grad():
        return torch.cat([model(x) for x in DATA])


def in_rows(model):
    weight = model.qkv.weight.detach()
    return (weight if isinstance(model, Fused) else weight.T).clone()


@pytest.mark.parametrize("kind", [Fused, Transposed])
@pytest.mark.parametrize("slices", [QKV, BY_HEAD])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_its_own_rows_are_merged_and_given_back(kind, slices, method):
    model = mixed(kind, slices, method)
    before, patched, W0 = outputs(model), snapshot(model), in_rows(model)
    q = model.qkv.q.modification
    with torch.no_grad():  # from the equations: M of the unit vectors
        W = W0[rows(slices, "q")]
        expected = W + q.factors(torch.eye(5).double(), W.T, model.qkv.q).product(W.T).T
    folding = tokengate.fold(model, DATA)
    assert [folding.names(each) for each in ("merged", "dropped", "kept")] == [
        ["qkv.q"], ["qkv.v"], ["qkv.k"],
    ]  # fmt: skip
    assert list(tokengate.layers(model)) == ["qkv.k"]
    found, own = in_rows(model), rows(slices, "q")
    assert (found[own] - W0[own]).abs().max() > 0.01
    torch.testing.assert_close(found[own], expected, rtol=0, atol=1e-12)
    others = rows(slices, "k") + rows(slices, "v")
    assert torch.equal(found[others], W0[others])
    assert (outputs(model) - before).abs().max() < 1e-12
    assert folding.error < 1e-12
    folded = outputs(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(copied), folded)
        assert torch.equal(in_rows(tokengate.unpatch(copied)), W0)
    assert torch.equal(outputs(model), folded)

    with tokengate.disabled(model):
        assert torch.equal(in_rows(model), W0)
    assert torch.equal(in_rows(model), found)
    folding.undo()
    assert snapshot(model) == patched
    assert torch.equal(outputs(model), before)
    tokengate.fold(model, DATA)
    tokengate.unpatch(model)
    assert torch.equal(in_rows(model), W0)
    assert type(model.qkv).__name__ == ("Linear" if kind is Fused else "Conv1D")
    assert not model.qkv._modules


def test_saved_it_is_what_it_was(tmp_path):
    model = mixed()
    before = outputs(model)
    folding = tokengate.fold(model, DATA)
    tokengate.save(model, tmp_path)
    torch.manual_seed(0)
    other = Fused(QKV).eval()
    assert not torch.allclose(outputs(other), before, atol=1e-2)
    tokengate.load(other, tmp_path)
    assert list(tokengate.layers(other)) == ["qkv.q", "qkv.k"]
    assert other.qkv.q.gate is None
    torch.testing.assert_close(outputs(other), before, rtol=0, atol=1e-6)
    with pytest.raises(TokenGateError, match=r"'qkv\.v' is folded"):
        tokengate.patch(model, ["qkv.v"], slices={"qkv": QKV})
    folding.undo()


def test_folded_whole_the_fused_layer_is_plain():
    model = mixed()
    model.qkv.k.gate.tau.data.zero_()
    W0 = in_rows(model)
    folding = tokengate.fold(model, DATA)
    assert folding.names("merged") == ["qkv.q", "qkv.k"]
    assert type(model.qkv) is nn.Linear
    assert tokengate.layers(model) == {}
    assert not torch.equal(in_rows(model), W0)
    assert torch.equal(in_rows(tokengate.unpatch(model)), W0)


def test_a_cast_goes_along_and_w0_comes_back():
    model = mixed()
    W0 = in_rows(model)
    tokengate.fold(model, DATA)
    model.float()
    assert (in_rows(model) - W0).abs().max() > 0.05
    assert torch.equal(in_rows(tokengate.unpatch(model)), W0.float())


def test_a_tied_fused_weight_keeps_its_slices():
    model = mixed()
    model.tied = nn.Linear(5, 12).double()
    model.tied.weight = model.qkv.weight
    folding = tokengate.fold(model, DATA)
    assert "another module's" in folding.layers["qkv.q"].reason
    assert folding.names("dropped") == ["qkv.v"]


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 5}], ids=["packed", "separate"])
def test_projections_of_a_split_attention(widths):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths).double().eval()
    inputs = [torch.randn(2, 3, width).double() for width in (8, attention.kdim, attention.vdim)]
    base = {n: p.detach().clone() for n, p in attention.named_parameters()}
    objects = {n: id(p) for n, p in attention.named_parameters()}
    split_attention(attention)
    tokengate.patch(attention, ["q_proj", "v_proj", "out_proj"], "dora", rank=2)
    away_from_initialisation(attention, 0.3)
    attention.v_proj.gate.tau.data.fill_(1e6)
    with torch.no_grad():
        before = attention(*inputs)[0]
        folding = tokengate.fold(attention, [tuple(inputs)])
        assert folding.names("merged") == ["out_proj", "q_proj"]
        assert folding.names("dropped") == ["v_proj"]
        torch.testing.assert_close(attention(*inputs)[0], before, rtol=0, atol=1e-12)
        assert type(attention.q_proj).__name__ == "Projection"
        with pytest.raises(TokenGateError, match=r"_proj' is folded.*undo"):
            merge_attention(attention)
        with tokengate.disabled(attention):
            assert (attention(*inputs)[0] - before).abs().max() > 1e-2
        folding.undo()
        assert torch.equal(attention(*inputs)[0], before)
        tokengate.fold(attention, [tuple(inputs)])
    merge_attention(tokengate.unpatch(attention))
    assert {n: id(p) for n, p in attention.named_parameters()} == objects
    assert all(torch.equal(p, base[n]) for n, p in attention.named_parameters())
