"""DoRA's row norms: never stale, and never infinite."""

import copy

import pytest
import torch
from models import Net, away_from_initialisation
from torch import nn
from torch.nn import functional as F

import tokengate
from tokengate.methods import row_squares


def wanted(layer, x):
    """The layer's output from the definition, with the norms of what W0 is now."""
    m = layer.modification
    W0 = layer.weight.double()
    V = W0 + m.scale * m.B.double() @ m.A.double()
    merged = (m.magnitude.double() / V.norm(dim=1)).unsqueeze(1) * V
    return F.linear(x.double(), merged, layer.bias.double())


@pytest.fixture
def layer():
    layer = tokengate.patch(nn.Linear(6, 5), "all-linear", "dora", rank=2)
    away_from_initialisation(layer)
    layer(torch.randn(3, 6))  # fills the cache
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


def written_through_data(layer):
    layer.weight.data.mul_(torch.arange(1.0, 6.0)[:, None])
    layer.modification.forget_base()


@pytest.mark.parametrize(
    "change",
    [
        load,
        load_assign,
        scale_in_place,
        round_trip_through_16_bits,
        to_double,
        another_parameter,
        data,
        written_through_data,
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_stale_norm(layer, change, training):
    layer.train(training)
    change(layer)
    x = torch.randn(3, 6, dtype=layer.weight.dtype)
    torch.testing.assert_close(layer(x).double(), wanted(layer, x), rtol=1e-5, atol=1e-5)


def test_a_stale_norm_would_be_seen(layer):
    # PyTorch does not see this write, and the docstring says so.
    layer.weight.data.mul_(torch.arange(1.0, 6.0)[:, None])
    x = torch.randn(3, 6)
    assert not torch.allclose(layer(x).double(), wanted(layer, x), rtol=1e-2)


def test_the_base_norms_are_computed_once(layer, monkeypatch):
    calls = []
    plain = row_squares._squares
    monkeypatch.setattr(row_squares, "_squares", lambda layer: calls.append(1) or plain(layer))
    for _ in range(3):
        layer(torch.randn(3, 6))
    assert calls == []
    scale_in_place(layer)
    for _ in range(3):
        layer(torch.randn(3, 6))
    assert calls == [1]


class PartOf(nn.Module):
    """Rows of another layer, whose weight is a view made anew at each use."""

    def __init__(self, layer, start, stop):
        super().__init__()
        self.layer, self.rows = [layer], slice(start, stop)

    @property
    def weight(self):
        return self.layer[0].weight[self.rows]


def test_views_of_one_weight_share_what_is_remembered(monkeypatch):
    calls = []
    plain = row_squares._squares
    monkeypatch.setattr(row_squares, "_squares", lambda layer: calls.append(1) or plain(layer))
    whole = nn.Linear(6, 5)
    part, squares = PartOf(whole, 1, 3), row_squares.RowSquares()
    assert part.weight is not part.weight
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(squares.of(part), whole.weight[1:3].square().sum(1))
        assert calls == [1]
        whole.weight[1].mul_(3)
        torch.testing.assert_close(squares.of(part), whole.weight[1:3].square().sum(1))
        other = PartOf(whole, 2, 4)  # of the same weight, other rows
        torch.testing.assert_close(squares.of(other), whole.weight[2:4].square().sum(1))
    assert calls == [1, 1, 1]


def test_loading_where_no_version_is_raised(layer):
    """As fully_shard writes its unsharded weights."""
    x = torch.randn(3, 6)
    with torch.autograd._unsafe_preserve_version_counter(layer.weight), torch.no_grad():
        layer.weight.mul_(torch.arange(1.0, 6.0)[:, None])
    assert not torch.allclose(layer(x).double(), wanted(layer, x), rtol=1e-2)  # not seen
    layer.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), wanted(layer, x).float())


def test_swapped_tensors(layer, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    load(layer)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), wanted(layer, x).float())


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


def test_a_copy_has_its_own_cache(layer):
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
    with pytest.raises(tokengate.TokenGateError, match="DoRA was patched on the meta device"):
        model.blocks[0].q_proj.modification.reset_parameters()
    state = tokengate.patch(Net(), ["q_proj"], "dora").state_dict()
    model.load_state_dict(state)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, state[name])
    assert model(torch.randn(2, 3, 8)).isfinite().all()
