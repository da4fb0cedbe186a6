"""record(positions=True, ratios=True): S and r of every call, and of every sample."""

import copy
import gc

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation, one_sentence
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tokengate
from tokengate.kernels.change import Change
from tokengate.layers import calls
from tokengate.reports.call_store import CallStore

NAMES = ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj"]


def patched(tau=1.0, **options):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj", "v_proj"], tau=tau, **options)
    return away_from_initialisation(model)


class Masked(nn.Module):
    """(B, T, 8) -> (B, T, 8); fc1 sees the positions flattened, as OPT's does."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.fc1 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs_embeds, attention_mask=None):
        h = torch.tanh(self.q_proj(inputs_embeds))
        return self.fc1(h.flatten(0, 1)).view_as(h)


def by_hand(model, x):
    """r of every call of the patched layers, in float32, with the model as it is."""
    found = {}

    def watch(layer, inputs, output, name):
        w = nn.functional.linear(inputs[0], layer.weight)
        m = layer.modification.factors(inputs[0], w, layer).product(w)
        found.setdefault(name, []).append(m.norm(dim=-1) / w.norm(dim=-1))

    handles = [
        layer.register_forward_hook(lambda *args, name=name: watch(*args, name))
        for name, layer in tokengate.layers(model).items()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("method", ["lora", "dora", "adapter"])
@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 2, 5, 8), (7, 8), (8,)])
def test_ratios_are_those_that_decided(method, shape):
    model, x = patched(method=method).eval(), torch.randn(shape)
    with tokengate.record(model, positions=True, ratios=True) as rec:
        model(x)
    assert list(rec.ratios) == list(rec.positions) == NAMES
    for name, (wanted,) in by_hand(model, x).items():
        ((is_open,), (kept,)) = rec.positions[name], rec.ratios[name]
        assert kept.dtype == torch.float16
        torch.testing.assert_close(kept.float(), wanted, rtol=1e-3, atol=0)
        clear = (wanted - 1).abs() > 1e-3
        assert torch.equal((wanted >= 1)[clear], is_open[clear])
    if shape == (4, 6, 8):
        assert 0 < rec.report().sparsity < 1


def test_without_a_gate_there_is_no_r():
    model = patched(gate=False)
    with tokengate.record(model, positions=True, ratios=True) as rec:
        model(torch.randn(2, 3, 8))
    assert list(rec.positions) == NAMES
    assert not rec.ratios
    assert rec.sample(0).ratios == {}
    with tokengate.record(patched(), ratios=True) as without_positions:
        pass
    with one_sentence("no ratios were recorded", "positions=True, ratios=True"):
        list(without_positions.ratios)


def test_nothing_is_measured_when_nobody_asks(monkeypatch):
    model = tokengate.patch(Net(), ["q_proj"], gate=False)  # whose gates want no norms
    keys = sorted(model.blocks[0].q_proj.__dict__)
    measured, plain = [], Change.norms
    monkeypatch.setattr(Change, "norms", lambda self: measured.append(1) or plain(self))
    with tokengate.record(model, positions=True) as rec:
        model(torch.randn(2, 3, 8))
    assert not measured
    with one_sentence("no ratios were recorded", "positions=True, ratios=True"):
        list(rec.ratios)
    assert rec.sample(0).ratios is None
    with tokengate.record(model, ratios=True), tokengate.record(model, ratios=True):
        model(torch.randn(2, 3, 8))
        copied = copy.deepcopy(model)
    assert len(measured) == 2  # once in each layer
    assert sorted(copied.blocks[0].q_proj.__dict__) == keys
    assert sorted(model.blocks[0].q_proj.__dict__) == keys


def test_nested_recordings_and_calibration_measure_on():
    model = patched()
    x = torch.randn(2, 3, 8)
    with tokengate.record(model, positions=True, ratios=True) as outer:
        with tokengate.record(model, positions=True, ratios=True) as inner:
            model(x)
        tokengate.calibrate(model, [x])
        model(x)
    assert [len(rec.ratios[NAMES[0]]) for rec in (outer, inner)] == [3, 1]
    assert torch.equal(outer.ratios[NAMES[0]][0], inner.ratios[NAMES[0]][0])


def test_samples_count_over_calls():
    model = patched()
    calls = [torch.randn(2, 5, 8), torch.randn(1, 3, 8), torch.randn(0, 4, 8), torch.randn(2, 7, 8)]
    with tokengate.record(model, positions=True, ratios=True) as rec:
        for x in calls:
            model(x)
    assert len(rec.samples) == 5
    rows = [(0, 0), (0, 1), (1, 0), (3, 0), (3, 1)]
    for sample, (call, row) in zip(rec.samples, rows, strict=True):
        assert list(sample.is_open) == list(sample.ratios) == NAMES
        assert sample.real.tolist() == [True] * calls[call].shape[1]
        for name in NAMES:
            assert torch.equal(sample.is_open[name], rec.positions[name][call][row])
            assert torch.equal(sample.ratios[name], rec.ratios[name][call][row])
    assert torch.equal(rec.sample(-1).is_open[NAMES[0]], rec.sample(4).is_open[NAMES[0]])
    assert [len(s.real) for s in rec.samples[1:4]] == [5, 3, 7]
    assert [len(s) for s in rec.positions[NAMES[0]][1:]] == [1, 0, 2]


@pytest.mark.parametrize("masked", [True, False])
def test_a_mask_tells_samples_of_flattened_positions(masked):
    torch.manual_seed(0)
    model = away_from_initialisation(tokengate.patch(Masked(), "all-linear", tau=0.5))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    with tokengate.record(model, positions=True, ratios=True) as rec:
        model(torch.randn(3, 4, 8), attention_mask=mask if masked else None)
    assert [tuple(rec.positions[name][0].shape) for name in rec.positions] == [(3, 4), (12,)]
    if masked:
        assert [s.real.tolist() for s in rec.samples] == mask.bool().tolist()
        flat = rec.positions["fc1"][0].reshape(3, 4)
        assert torch.equal(rec.sample(1).is_open["fc1"], flat[1])
        return
    with one_sentence("'q_proj' and 'fc1'", "not called alike", "rec.alike"):
        rec.sample(0)
    assert [(each.modules, len(each)) for each in rec.alike] == [(["q_proj"], 3), (["fc1"], 12)]
    assert rec.sample(2, ["q_proj"]).is_open.keys() == {"q_proj"}
    assert rec.sample(11, ["fc1"]).real.tolist() == [True]
    with one_sentence("not called alike"):
        rec.sample(0, ["q_proj", "fc1"])


def test_unequal_padding_is_not_alike():
    """Of as many samples of the same length, but one was padded otherwise."""
    model = nn.ModuleDict({"a": Masked(), "b": Masked()})
    tokengate.patch(model, ["q_proj"])
    x = torch.randn(2, 3, 8)
    with tokengate.record(model, positions=True) as rec:
        model["a"](x, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
        model["b"](x, attention_mask=torch.ones(2, 3))
    assert [each.modules for each in rec.alike] == [["a.q_proj"], ["b.q_proj"]]
    with tokengate.record(model, positions=True) as rec:
        model["a"](x, attention_mask=torch.ones(2, 3))
        model["b"](x)
    assert rec.sample(0).real.tolist() == [True] * 3


def test_a_decode_with_a_cache_is_many_samples():
    model = patched()
    with tokengate.record(model, positions=True) as rec:
        for length in (5, 1, 1):
            model(torch.randn(2, length, 8))
    assert [len(sample.real) for sample in rec.samples] == [5, 5, 1, 1, 1, 1]
    assert rec.report().modules[NAMES[0]].samples == len(rec.samples)


def test_what_cannot_be_told_is_said():
    model = patched()
    with tokengate.record(model) as plain, tokengate.record(model, positions=True) as rec:
        with one_sentence("no positions were recorded", "positions=True"):
            _ = rec.samples
        model.blocks[0](torch.randn(2, 3, 8))
    with one_sentence("no positions were recorded"):
        plain.sample(0)
    with one_sentence("sample 2 was asked", "of 2"):
        rec.sample(2)
    with one_sentence("sample 0.5 was asked", "of 2"):
        rec.sample(0.5)
    with one_sentence("'blocks.1.q_proj'", "not called"):
        rec.sample(0, ["blocks.1.q_proj"])
    with one_sentence("asked of no module"):
        rec.sample(0, [])
    with pytest.raises(KeyError):
        rec.positions["blocks.1.q_proj"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ratios": 1}, ["ratios=1", "True nor False"]),
        ({"positions": True, "memory": 0}, ["memory=0"]),
        ({"positions": True, "folder": "nowhere"}, ["folder='nowhere'", "no folder"]),
        ({"folder": "nowhere"}, ["folder='nowhere'", "without positions=True"]),
        ({"positions": "all"}, ["positions='all'", "True nor False"]),
        ({"groups": ["text"]}, ["groups=['text']", "no function"]),
    ],
)
def test_wrong_arguments(wrong, words):
    model = patched()
    with one_sentence(*words), tokengate.record(model, **wrong):
        pass
    assert not calls.OPEN


def test_rows_of_several_adapters_have_no_r(tmp_path):
    model = patched()
    tokengate.save(model, tmp_path)
    tokengate.load(model, tmp_path, name="other")
    with (
        tokengate.record(model, ratios=True),
        tokengate.use(model, ["default", "other"]),
        one_sentence("'blocks.0.q_proj'", "for each row"),
    ):
        model(torch.randn(2, 3, 8))


def test_beyond_the_limit_it_goes_to_a_file_that_goes_with_the_recorder(tmp_path):
    model = patched()
    x = torch.randn(2, 40, 8)
    with tokengate.record(model, positions=True, ratios=True) as whole:
        for _ in range(3):
            model(x)
    with tokengate.record(model, positions=True, ratios=True, memory=500, folder=tmp_path) as rec:
        for _ in range(3):
            model(x)
    kept, in_memory = rec._calls._bytes, whole._calls._bytes
    assert (kept._rolled, in_memory._rolled) == (True, False)
    for name in NAMES:
        assert all(map(torch.equal, rec.positions[name], whole.positions[name]))
        assert all(map(torch.equal, rec.ratios[name], whole.ratios[name]))
    del rec
    gc.collect()
    assert kept.closed
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=many(60))
@given(st.data())
def test_the_store_gives_back_what_it_was_given(data):
    store = CallStore(data.draw(st.sampled_from([1, 64, 2**20])), None)
    given_to = {"a": [], "b": []}
    for _ in range(data.draw(st.integers(1, 8))):
        rows, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 19))
        seed = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        is_open, real = (torch.rand(rows, length, generator=seed) < 0.7 for _ in range(2))
        ratios = torch.rand(rows, length, generator=seed) if data.draw(st.booleans()) else None
        name = data.draw(st.sampled_from(["a", "b"]))
        store.add(name, is_open, real, ratios)
        given_to[name].append((is_open, real, ratios))
    for name in store.names:
        assert store.count(name) == len(given_to[name])
        assert store.has_ratios(name) == any(r is not None for _, _, r in given_to[name])
        for call, (is_open, real, ratios) in enumerate(given_to[name]):
            assert torch.equal(store.is_open(name, call), is_open)
            assert torch.equal(store.real(name, call), real)
            kept = store.ratios(name, call)
            assert kept.isnan().all() if ratios is None else torch.equal(kept, ratios.half())


def test_a_position_takes_a_bit_and_r_16():
    store = CallStore(2**30, None)
    is_open, real = torch.rand(8, 1024) < 0.5, torch.ones(8, 1024, dtype=torch.bool)
    store.add("a", is_open, real, None)
    assert store._end == 1024
    real[0, 0] = False
    for name in ("b", "c"):  # which share a mask
        store.add(name, is_open, real, torch.rand(8, 1024))
    assert store._end == 4 * 1024 + 2 * 2 * 8192


def test_compiled_code_keeps_positions_without_compiling_anew():
    torch.compiler.reset()
    model = patched()
    model(torch.randn(2, 5, 8))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    batches = [torch.randn(2, length, 8) for length in range(5, 17)]
    with torch.no_grad():
        with tokengate.record(model, positions=True, ratios=True) as eager:
            for x in batches:
                model(x)
        with tokengate.record(model, positions=True, ratios=True) as rec:
            graphs = []
            for x in batches:
                compiled(x)
                graphs.append(counter.frame_count)
    # Lengths are dynamic from the second on, in what is compiled between graphs one or two later.
    assert graphs[4:] == [graphs[3]] * 8
    for name in NAMES:
        assert all(map(torch.equal, rec.positions[name], eager.positions[name]))
        for one, other in zip(rec.ratios[name], eager.ratios[name], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=0)


def test_r_is_counted_in_one_whole_graph():
    torch.compiler.reset()
    model = patched()
    model(torch.randn(2, 5, 8))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batches = [torch.randn(2, length, 8) for length in range(5, 17)]
    reports = []
    for run in (model, compiled):
        with tokengate.record(model, ratios=True) as rec, torch.no_grad():
            for x in batches:
                run(x)
        reports.append(rec.report())
    assert counter.frame_count == 2
    eager, whole = (report.histogram().counts for report in reports)
    assert sum(eager) == sum(whole) == 4 * 2 * sum(range(5, 17))
    # A rounding may put an r at an edge into the next bin.
    assert sum(abs(a - b) for a, b in zip(eager, whole, strict=True)) <= 4


def test_r_of_a_layer_with_the_positions_first():
    """As S: the samples first, also where the layer has them second."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)  # (T, B, 8)
    away_from_initialisation(tokengate.patch(model, ["linear1"], tau=1.0))
    x = torch.randn(4, 3, 8)
    with tokengate.record(model, positions=True, ratios=True) as rec:
        model(x)
        for row in range(3):
            model(x[:, row : row + 1])
    together, *alone = rec.ratios["linear1"]
    assert together.shape == (3, 4)
    torch.testing.assert_close(together, torch.cat(alone), rtol=2e-3, atol=0)
    assert not torch.allclose(together.reshape(4, 3).T, torch.cat(alone), rtol=0.1)


def test_what_is_kept_of_a_module_is_a_list():
    layer = tokengate.patch(torch.nn.Linear(4, 3), "all-linear", tau=0.5)
    with tokengate.record(layer, positions=True) as rec:
        for rows in (2, 3):
            layer(torch.randn(rows, 5, 4))
    assert isinstance(rec.positions[""], list)
    assert torch.cat(rec.positions[""]).shape == (5, 5)
