"""`nn.Conv2d`: a linear layer of patches, whose positions are output pixels."""

import copy
import pickle
import warnings

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
from tokengate.errors import SkippedModuleWarning

METHODS = ["lora", "dora", "adalora", "adapter"]
MODES = ["zeros", "reflect", "replicate", "circular"]


class Net(nn.Module):
    """Three convolutions, the second at half the resolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.point(torch.relu(self.down(torch.relu(self.stem(x)))))


ALL = ["stem", "down", "point"]


def dense(up, groups):
    """A block-diagonal B as a matrix, made in another way than the library's."""
    return torch.block_diag(*up.chunk(groups))


def in_loops(layer, x, grad):
    """What `reference.layer` gives of a patched convolution, and its gradient of the image."""
    modification, gate, groups = layer.modification, layer.gate, layer.groups
    p = {n: v.detach().numpy() for n, v in modification.named_parameters()}
    if "B" in p:
        p["B"] = dense(modification.B.detach(), groups).numpy()
    W = reference.ungrouped(layer.weight.detach().numpy(), groups)
    sides = tuple(layer._reversed_padding_repeated_twice)  # those of the last dimension first
    edges = ((0, 0), (0, 0)) if layer.padding == "valid" else (sides[2:], sides[:2])
    places = reference.patches(
        x.shape, layer.kernel_size, layer.stride, edges, layer.dilation, layer.padding_mode
    )
    image, back = reference.gathered(x.detach().numpy(), places)
    scale = modification.scale
    modify = {
        "LoRA": lambda x_i, w_i: reference.lora(x_i, w_i, p, scale),
        "DoRA": lambda x_i, w_i: reference.dora(x_i, w_i, p, scale, W),
        "AdaLoRA": lambda x_i, w_i: reference.adalora(x_i, w_i, p, scale),
        "Adapter": lambda x_i, w_i: reference.adapter(x_i, w_i, p, scale, "tanh"),
    }[type(modification).__name__]
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    rows = grad.movedim(1, -1).reshape(-1, grad.shape[1]).numpy()
    found = reference.layer(image, W, bias, p, modify, gate.tau.item(), gate.penalty, rows)
    return found, back(found["x"])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")
@given(st.data())
@settings(max_examples=many(16), deadline=None)
def test_it_is_the_loop_over_output_pixels(data):
    draw = data.draw
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.sampled_from(["valid", "same", (0, 1), (1, 1), (2, 1)]))
    stride = (1, 1) if padding == "same" else draw(st.tuples(*[st.integers(1, 2)] * 2))
    method = draw(st.sampled_from(METHODS))
    torch.manual_seed(draw(st.integers(0, 9)))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * 2))
    layer = nn.Conv2d(
        2 * groups, 2 * groups, draw(pair), stride, padding, dilation, groups,
        bias=draw(st.booleans()), padding_mode=draw(st.sampled_from(MODES)),
        dtype=torch.float64,
    )  # fmt: skip
    options = {"activation": "tanh"} if method == "adapter" else {}
    model = nn.ModuleDict({"conv": layer})
    tokengate.patch(model, ["conv"], method, rank=2, penalty=0.03, scale=0.7, **options)
    away_from_initialisation(model, 0.5)
    x = torch.randn(2, 2 * groups, 5, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad(), tokengate.record(model, positions=True, ratios=True) as rec:
        layer(x)
    # In the middle of two ratios, so that no rounding decides.
    ratios = rec.ratios["conv"][0].double().flatten().sort().values
    with torch.no_grad():
        layer.gate.tau.fill_(float(ratios[len(ratios) // 2 - 1 : len(ratios) // 2 + 1].mean()))
    with tokengate.record(model, positions=True) as rec:
        h = layer(x)
    grad = torch.randn(h.shape, dtype=torch.float64)
    h.backward(grad)
    wanted, grad_x = in_loops(layer, x, grad)
    close = {"rtol": 1e-10, "atol": 1e-10}
    (is_open,) = rec.positions["conv"]
    assert is_open.shape == (2, *h.shape[2:])
    assert is_open.flatten().tolist() == wanted["S"]
    np.testing.assert_allclose(
        h.detach().movedim(1, -1).reshape(len(wanted["h"]), -1), wanted["h"], **close
    )
    np.testing.assert_allclose(x.grad, grad_x, **close)
    np.testing.assert_allclose(layer.gate.tau.grad.item(), wanted["tau"], **close)
    for name, parameter in layer.modification.named_parameters():
        ours = parameter.grad
        if name == "B":
            blocks = dense(torch.ones_like(parameter), groups)
            ours, wanted["B"] = dense(ours, groups), wanted["B"] * blocks.numpy()
        np.testing.assert_allclose(ours, wanted[name], **close, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_op_at_first_in_the_same_memory_format_and_given_back(method, layout, dtype):
    model = Net().to(dtype=dtype, memory_format=layout)
    x = torch.randn(2, 3, 8, 6).to(dtype=dtype, memory_format=layout)
    base, alone, before = model(x), model(x[0]), snapshot(model)
    tokengate.patch(model, ALL, method, rank=2)
    assert isinstance(model.stem, nn.Conv2d)
    assert type(model.stem).__name__ == "GatedConv2d"
    first = model(x)
    assert torch.equal(first, base)
    assert torch.equal(model(x[0]), alone), "an image without a batch"
    away_from_initialisation(model)
    changed = model(x)
    assert not torch.equal(changed, base)
    assert changed.stride() == first.stride() == base.stride()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), changed)
    torch.testing.assert_close(model(x[0]), changed[0], rtol=0.02, atol=0.02)
    tokengate.unpatch(model)
    assert torch.equal(model(x), base)
    assert snapshot(model) == before


def test_a_closed_gate_leaves_the_pixel_as_it_is():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    base = model.stem(x)
    tokengate.patch(model, ["stem"], rank=2)
    away_from_initialisation(model)
    with tokengate.record(model, positions=True, ratios=True) as rec:
        model.stem(x)
    middle = rec.ratios["stem"][0].float().median().item()
    with torch.no_grad():
        model.stem.gate.tau.fill_(middle)
    with tokengate.record(model, positions=True) as rec:
        h = model.stem(x)
    is_open = rec.positions["stem"][0]
    assert is_open.shape == (2, 8, 8)
    assert 0.3 < is_open.float().mean() < 0.7
    same = (h == base).all(1)
    assert torch.equal(same, ~is_open)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("groups", [1, 4])
def test_folded_saved_and_loaded(method, groups, tmp_path):
    model = Net().double()
    if groups > 1:
        model.down = nn.Conv2d(8, 8, 3, 2, 1, groups=groups, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    tokengate.patch(model, ALL, method, rank=4)
    away_from_initialisation(model, 0.3)
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.gate.tau.fill_(-1.0)
    wanted = model(x)
    assert not torch.allclose(wanted, plain(x))
    tokengate.save(model, tmp_path / "adapter")
    loaded = copy.deepcopy(plain)
    tokengate.load(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(x), wanted)
    again = tokengate.patch(copy.deepcopy(plain), ALL, method, rank=4)
    tokengate.load(again, tmp_path / "adapter")
    assert torch.equal(again(x), wanted)

    folding = tokengate.fold(model, [{"x": x}])
    merged = ALL if groups == 1 else ["stem", "point"]
    assert folding.names("merged") == merged
    if groups > 1:
        assert "grouped convolution" in folding.layers["down"].reason
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
    folding.undo()
    assert torch.equal(model(x), wanted)
    tokengate.unpatch(model)
    assert torch.equal(model(x), plain(x))


def test_a_convolution_of_other_channels_is_refused_by_load(tmp_path):
    model = tokengate.patch(Net(), ["stem"], rank=2)
    tokengate.save(model, tmp_path / "adapter")
    other = Net()
    other.stem = nn.Conv2d(3, 8, 5, padding=2)
    with pytest.raises(tokengate.TokenGateError, match=r"\(27, 8\) in the adapter and \(75, 8\)"):
        tokengate.load(other, tmp_path / "adapter")


def test_restricted_to_pixels():
    model, x = Net(), torch.randn(2, 3, 8, 8)
    base = model(x)
    tokengate.patch(model, ALL, rank=2, gate=False)
    away_from_initialisation(model)
    inside = torch.rand(2, 8, 8) < 0.4
    full = model.stem(x)
    with tokengate.disabled(model):
        plain = model.stem(x)
    with tokengate.restrict(model, {"stem": inside}):
        part = model.stem(x)
    assert not torch.equal(full, plain)
    assert torch.equal(part, torch.where(inside.unsqueeze(1), full, plain))
    # Layers of another resolution have other pixels.
    with (
        tokengate.restrict(model, inside),
        pytest.raises(tokengate.TokenGateError, match=r"\(2, 8, 8\).*'down'.*\(2, 4, 4\)"),
    ):
        model(x)

    def resized(name, shape):
        sized = nn.functional.adaptive_max_pool2d(inside.float(), shape[1:])
        return sized != 0

    with tokengate.restrict(model, resized):
        assert not torch.equal(model(x), base)
    with tokengate.restrict(model, lambda name, shape: False):
        assert torch.equal(model(x), base)


def test_reported_by_pixel_and_row():
    model, x = Net(), torch.randn(2, 3, 8, 8)
    tokengate.patch(model, ALL, rank=2, tau=0.2)
    away_from_initialisation(model)
    with tokengate.record(model, positions=True) as rec:
        model(x)
    report = rec.report()
    assert {n: m.positions for n, m in report.modules.items()} == {
        "stem": 128,
        "down": 32,
        "point": 32,
    }
    assert report.to_markdown()
    verified = Net()
    tokengate.verify(tokengate.patch(verified, ALL), x)


def test_rows_and_regions_have_adapters_of_their_own(tmp_path):
    model, x = Net(), torch.randn(2, 3, 8, 8)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        made = tokengate.patch(copy.deepcopy(model), ["stem"], rank=2, gate=False)
        away_from_initialisation(made)
        tokengate.save(made, tmp_path / name)
    for name in ("one", "two"):
        tokengate.load(model, tmp_path / name, name=name)
    outputs = {}
    for name in ("one", "two", None):
        with tokengate.use(model, name):
            outputs[name] = model.stem(x)
    with tokengate.use(model, ["two", None]):
        rows = model.stem(x)
    assert torch.allclose(rows, torch.stack([outputs["two"][0], outputs[None][1]]), atol=1e-6)
    left = torch.zeros(2, 8, 8, dtype=torch.bool)
    left[..., :4] = True
    with tokengate.use(model, {"one": left, "two": ~left}):
        regions = model.stem(x)
    wanted = torch.where(left.unsqueeze(1), outputs["one"], outputs["two"])
    assert not torch.allclose(wanted, outputs["one"], atol=1e-3)
    assert torch.allclose(regions, wanted, atol=1e-6)


@tokengate.register("tests.mean_of_patch")
class MeanOfPatch(tokengate.Modification):
    """A user's method, which reads x and w as beside a linear layer."""

    def __init__(self, linear):
        super().__init__(linear)
        self.gain = self.new_parameter(self.out_features)

    def reset_parameters(self):
        nn.init.zeros_(self.gain)

    def forward(self, x, w):
        assert x.shape[-1] == self.in_features
        assert w.shape == (*x.shape[:-1], self.out_features)
        return self.gain.to(w.dtype) * x.mean(-1, keepdim=True)


@pytest.mark.parametrize("gate", ["threshold", "sigmoid", "random"])
def test_own_methods_and_gates_see_patches(gate):
    model, x = Net(), torch.randn(2, 3, 8, 8)
    base = model(x)
    tokengate.patch(model, ["stem"], MeanOfPatch, gate=gate)
    tokengate.patch(model, ["point"], gate=gate, rank=2)
    assert torch.equal(model(x), base)
    with torch.no_grad():
        model.stem.modification.gain.fill_(1.0)
    mean = nn.functional.avg_pool2d(x, 3, 1, 1).mean(1, keepdim=True)
    with tokengate.disabled(model):
        plain = model.stem(x)
    changed = model.eval().stem(x) - plain
    some = (changed != 0).any(1)
    assert some.any()
    assert torch.allclose(
        changed.movedim(1, -1)[some], mean.expand_as(changed).movedim(1, -1)[some], atol=1e-5
    )
    model.train()(x).square().sum().backward()
    assert model.stem.modification.gain.grad.any()


def test_compiled_in_one_graph():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1))
    tokengate.patch(model, ["0", "1"], "dora", rank=2, tau=0.1)
    away_from_initialisation(model)
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x)
    wanted.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for p, grad in zip((p for p in model.parameters() if p.requires_grad), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Conv1d(3, 4, 3), r"an nn\.Conv1d, and of convolutions nn\.Conv2d alone"),
        (nn.Conv3d(3, 4, 3), r"an nn\.Conv3d, and of convolutions"),
        (nn.ConvTranspose2d(3, 4, 3), r"an nn\.ConvTranspose2d, and of convolutions"),
        (nn.Embedding(5, 4), r"an nn\.Embedding, .*train it whole with train="),
        (nn.EmbeddingBag(5, 4), r"an nn\.EmbeddingBag, .*train it whole with train="),
        (Standardised(3, 4, 3), r"a Standardised, whose class computes with other weights"),
        (nn.Conv2d(4, 4, 3, groups=4), r"rank=2 .* groups=4, .*multiple of that"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_refused_in_one_sentence(layer, says):
    model = nn.ModuleDict({"layer": layer, "other": nn.Linear(2, 2)})
    with pytest.raises(tokengate.TokenGateError, match=says):
        tokengate.patch(model, ["layer"], rank=2)
    assert not tokengate.layers(model)


def test_all_linear_means_no_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(1), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SkippedModuleWarning)
        tokengate.patch(model, "all-linear")
    assert list(tokengate.layers(model)) == ["2"]
