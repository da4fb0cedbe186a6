"""calibrate: tau is the quantile of r that eq. 23 asks for."""

import math

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation, one_sentence, padded_bert, snapshot

import tokengate
from tokengate import TokenGateError
from tokengate.errors import UnreachedSparsityWarning
from tokengate.gates.positions import Positions
from tokengate.gates.score_counts import count_scores, no_counts
from tokengate.kernels.change import Change
from tokengate.training.seen_scores import SeenScores


def patched(method="lora", **options):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj", "fc1"], method=method, dropout=0.3, **options)
    return away_from_initialisation(model, 0.2)


def batches(count=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (count,), generator=draw).tolist()
    return [torch.randn(4, length, 8, generator=draw) for length in lengths]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_one_layer_reaches_the_sparsity_that_was_asked(method, sparsity):
    """Of one layer, whose inputs no other gate changes."""
    model = tokengate.patch(Net(), ["blocks.1.fc1"], method=method, dropout=0.3)
    away_from_initialisation(model, 0.2)
    data = batches(40)
    with tokengate.record(model) as rec:
        for x in data:
            model(x)
    assert rec.report().sparsity == 0
    taus = tokengate.calibrate(model, data, sparsity=sparsity)
    model.eval()
    with tokengate.record(model) as rec:
        for x in data:
            model(x)
    assert rec.report().sparsity == pytest.approx(sparsity, abs=0.005)
    assert taus == {"blocks.1.fc1": model.blocks[1].fc1.gate.tau.item()}


@given(
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0.05, 0.95),
    scale=st.floats(0.01, 30),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
@settings(max_examples=many(25), deadline=None)
def test_tau_splits_the_ratios_of_the_reference(seed, sparsity, scale, lengths):
    torch.manual_seed(seed)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5).double())
    tokengate.patch(layer, ["0"], rank=2)
    away_from_initialisation(layer, scale)
    data = [torch.randn(2, length, 6, dtype=torch.float64) for length in lengths]
    tau = tokengate.calibrate(layer, data, sparsity)["0"]
    shares, ratios = [], []
    for x in data:
        w = x @ layer[0].weight.T
        m = layer[0].modification.eval()(x, w)
        for sample in range(len(x)):
            r = [reference_ratio(w[sample, i], m[sample, i]) for i in range(x.shape[1])]
            ratios += [(value, 1 / len(r)) for value in r]
            shares.append(sum(value < tau for value in r) / len(r))
    # As near as a position and the bins' width allow.
    near = sum(weight for value, weight in ratios if abs(value / tau - 1) < 2e-3)
    step = max(weight for _, weight in ratios) + near
    assert abs(sum(shares) - sparsity * len(shares)) <= step + 1e-9


def reference_ratio(w, m):
    """||m|| / ||w||, summed up by hand."""
    square = [sum(float(value) ** 2 for value in vector) for vector in (m.detach(), w.detach())]
    return (square[0] / square[1]) ** 0.5


def test_the_reference_and_the_gate_agree_about_the_ratio():
    layer = patched().blocks[0].fc1
    w, m = torch.randn(4, 8), torch.randn(4, 8)
    tau = reference_ratio(w[0], m[0])
    for sign in (-1, 1):
        with torch.no_grad():
            layer.gate.tau.fill_(tau * (1 + sign * 1e-5))
        is_open = layer.gate(Positions(Change(w[:1], None, m[:1]))) != 0
        assert bool(is_open) is (sign < 0)


def test_padding_does_not_count():
    model, batch, alone = padded_bert(dropout=0.1)
    padded = tokengate.calibrate(model, [batch])
    assert padded == pytest.approx(tokengate.calibrate(model, alone), rel=1e-5)
    unmasked = tokengate.calibrate(model, [{"input_ids": batch["input_ids"]}])
    assert padded != pytest.approx(unmasked, rel=1e-5)


def test_padding_does_not_count_where_the_positions_come_first():
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(6)[None] >= torch.tensor([6, 2, 3])[:, None]
    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        away_from_initialisation(tokengate.patch(model, ["linear1"]))
        src = x if batch_first else x.transpose(0, 1)
        found += [tokengate.calibrate(model, [{"src": src, "src_key_padding_mask": padding}])]
        found += [tokengate.calibrate(model, [{"src": src}])]
    first, unpadded, second, _ = (taus["linear1"] for taus in found)
    assert abs(first - unpadded) > 0.01
    assert second == pytest.approx(first, rel=1e-5)


def test_nothing_but_tau_changes():
    model = patched().train()
    model.blocks[1].eval()
    model(batches(1)[0])  # what the first forward leaves
    before = snapshot(model)
    taus = tokengate.calibrate(model, batches(), 0.5)
    after = snapshot(model)
    assert before != after
    names = {f"{name}.gate.tau" for name in taus}
    for state in (before, after):
        for name in names:
            del state["values"][name]
    assert before == after
    assert len(set(taus.values())) == len(taus)
    assert min(taus.values()) > 0


def test_a_second_calibration_gives_the_same():
    model = patched()
    first = tokengate.calibrate(model, batches())
    assert tokengate.calibrate(model, batches()) == first
    assert tokengate.calibrate(model, batches(), sparsity=0.0) == dict.fromkeys(first, 0.0)


def test_a_modification_that_does_nothing_stays_open():
    model = tokengate.patch(Net(), ["q_proj"], tau=0.3)
    with pytest.raises(tokengate.TokenGateError, match=r"M\(x\) = 0 at every position"):
        tokengate.calibrate(model, batches())
    first, second = tokengate.layers(model).values()
    assert first.gate.tau.item() == second.gate.tau.item() == pytest.approx(0.3)
    torch.nn.init.normal_(first.modification.B)
    found = tokengate.calibrate(model, batches())
    assert found["blocks.0.q_proj"] > 0
    assert found["blocks.1.q_proj"] == 0


def test_memory_does_not_grow_with_the_data():
    counts, sizes = SeenScores(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = 300 * 2 ** -torch.rand(5000, generator=generator)
        counts.add(scores, torch.ones(5000, dtype=torch.float64))
        sizes.append(len(counts.bins))
    assert sizes[0] > 900
    assert sizes[-1] <= 1025, "an octave has no more"
    counts.add(torch.tensor([0.0, torch.inf, torch.nan, 1e30]), torch.ones(4, dtype=torch.float64))
    assert counts.total == 100_004
    assert counts.weights[[0, -1]].tolist() == [1, 3]
    assert counts.bins[[0, -1]].tolist() == [counts.FIRST, counts.LAST]


@given(st.lists(st.floats(-63, 31), min_size=1, max_size=50), st.integers(0, 1000))
@settings(max_examples=many(25), deadline=None)
def test_seen_scores_divide_the_bins_of_training(logs, seed):
    scores = torch.tensor(logs, dtype=torch.float64).exp2()
    weights = torch.rand(len(logs), generator=torch.Generator().manual_seed(seed)).double()
    counts, coarse = SeenScores(), no_counts(scores.device)
    for one, weight in zip(scores.split(7), weights.split(7), strict=True):
        counts.add(one, weight)
    count_scores(coarse, scores, None)
    places = (counts.bins - 1).div(32, rounding_mode="floor") + 1
    assert torch.equal(places.unique(), coarse.nonzero().flatten())
    assert counts.total == pytest.approx(weights.sum().item())


def test_bad_input_leaves_the_taus_as_they_were():
    model = patched(tau=0.25)
    model(batches(1)[0])  # what the first forward leaves
    before = snapshot(model)

    def refused(match, *args):
        with pytest.raises(TokenGateError, match=match):
            tokengate.calibrate(model, *args)
        assert snapshot(model) == before

    refused("sparsity=1.0 is not in", batches(), 1.0)
    refused("calibrate was given", torch.randn(2, 3, 8))
    refused("calibrate was given", {"x": 1})
    refused("calibrate was given no batches", [])
    with pytest.raises(RuntimeError):
        tokengate.calibrate(model, [*batches(2), torch.randn(2, 3, 7)])
    assert snapshot(model) == before
    with pytest.raises(TokenGateError, match="calibrate was asked of a Net without"):
        tokengate.calibrate(Net(), batches())
    with pytest.raises(TokenGateError, match="have no gates"):
        tokengate.calibrate(patched(gate=False), batches())


def one_layer(bias=True):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=bias))
    return away_from_initialisation(tokengate.patch(model, ["0"], rank=2, tau=0.25), 0.5)


def closed_share(model, x):
    with tokengate.record(model.eval()) as rec:
        model(x)
    return rec.report().token_sparsity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_refused(bad):
    model, x = one_layer(), batches(1)[0][:, :6]
    x[1, 2, 3] = bad
    with one_sentence("calibrate found W0 x of '0' not finite", "at 1 of", "the inputs"):
        tokengate.calibrate(model, [batches(1)[0], x])
    assert model[0].gate.tau.item() == 0.25
    with one_sentence("modification_norms found W0 x of '0' not finite"):
        tokengate.modification_norms(model, [x])


def test_a_modification_that_is_not_finite_is_refused():
    model = one_layer()
    model[0].modification.B.data[0, 0] = math.nan
    with one_sentence("found M(x) of '0' not finite"):
        tokengate.calibrate(model, batches())
    assert model[0].gate.tau.item() == 0.25


def test_a_nan_in_padding_is_nobodys():
    model, batch, _ = padded_bert()
    model.encoder.layer = model.encoder.layer[:1]  # attention spreads NaN further
    embeddings = model.embeddings(batch["input_ids"]).detach()
    embeddings[0, 4:] = embeddings[2, 7:] = math.nan
    given = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    with one_sentence("'encoder.layer.0"):
        tokengate.calibrate(model, [{"inputs_embeds": embeddings}])
    (tau,) = tokengate.calibrate(model, [given]).values()
    assert 0 < tau < 10


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("zeros", [3, 6, 8, 10])
def test_rows_that_are_mostly_zero_close_no_more_than_was_asked(zeros, sparsity):
    """W0 x is 0 there, and no tau closes them: not tau = 2^16, which closes all others for good."""
    model, x = one_layer(bias=False), torch.randn(4, 10, 8)
    x[:, :zeros] = 0
    if zeros / 10 <= 1 - sparsity:
        tokengate.calibrate(model, [x], sparsity)
        assert closed_share(model, x) == pytest.approx(sparsity, abs=0.03)
        return
    words = f"close {100 * sparsity:.0f} %.*'0' .*closes {100 - 10 * zeros} %.* {10 * zeros} %"
    with pytest.warns(UnreachedSparsityWarning, match=words):
        taus = tokengate.calibrate(model, [x], sparsity)
    assert closed_share(model, x) == pytest.approx(1 - zeros / 10)
    assert 0 <= taus["0"] < 10
    if zeros < 10:  # larger changes than were seen are not closed
        assert taus["0"] == pytest.approx(max(ratios(model, x[:, zeros:])), rel=2e-3)


def ratios(model, x):
    w = x @ model[0].weight.T
    m = model[0].modification(x, w)
    pairs = zip(w.flatten(0, 1), m.flatten(0, 1), strict=True)
    return [reference_ratio(*pair) for pair in pairs]


@pytest.mark.parametrize(("sparsity", "closes"), [(0.0, 0), (0.2, 0), (0.4, 0), (0.6, 1), (0.8, 1)])
def test_of_equal_ratios_the_nearer_side_is_taken_and_said(sparsity, closes):
    model, x = one_layer(), torch.randn(8).expand(4, 10, 8)
    if sparsity == 0:
        tokengate.calibrate(model, [x], sparsity)
    else:
        with pytest.warns(UnreachedSparsityWarning, match=f"'0' .*{100 * closes} %.* the same"):
            tokengate.calibrate(model, [x], sparsity)
    assert closed_share(model, x) == closes


def test_where_most_do_nothing_the_nearer_side_is_taken():
    """m = 0 at 70 % of the positions, which any tau closes."""
    model, x = one_layer(), torch.randn(4, 10, 8)
    model[0].modification.A.data[:, 1:] = 0
    x[:, :7, 0] = 0
    with pytest.warns(UnreachedSparsityWarning, match="70 %"):
        tokengate.calibrate(model, [x], 0.5)
    assert closed_share(model, x) == pytest.approx(0.7)


def led(gate="threshold", per_layer=False, seed=0):
    """Three layers that a schedule has led, and inputs that are like those of the training."""
    torch.manual_seed(seed)
    parts = [torch.nn.Linear(8, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Tanh()]
    model = torch.nn.Sequential(*parts, torch.nn.Linear(24, 5))
    tokengate.patch(model, "all-linear", rank=4, gate=gate)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=3e-2))
    tokengate.SparsitySchedule(model, optimizer, 0.6, 30, per_layer=per_layer)
    for _ in range(30):
        optimizer.zero_grad()
        (model(torch.randn(8, 30, 8)) - 1).square().mean().backward()
        optimizer.step()
    return model, [torch.randn(200, 30, 8) for _ in range(2)]


def shares(model, x):
    with tokengate.record(model.eval()) as rec:
        model(x)
    return rec.report().by_module


@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
def test_one_threshold_for_all_layers_goes_on_from_where_a_schedule_ended(gate):
    model, (seen, unseen) = led(gate)
    tokengate.calibrate(model, [seen], 0.3, per_layer=False, warm_start=True)
    taus = tokengate.calibrate(model, [seen], 0.3, per_layer=False, warm_start=True)
    assert len(set(taus.values())) == 1
    found = shares(model, unseen)
    assert max(found.values()) - min(found.values()) > 0.1, "which layers close is their scores'"
    assert sum(found.values()) / 3 == pytest.approx(0.3, abs=0.015)


def test_a_warm_start_sees_the_inputs_that_closing_leaves():
    """With all gates open the later layers saw others: so far off here."""
    model, (seen, _) = led(per_layer=True)
    tokengate.calibrate(model, [seen], 0.6)
    cold = shares(model, seen)
    assert max(abs(share - 0.6) for share in cold.values()) > 0.05
    for _ in range(2):
        tokengate.calibrate(model, [seen], 0.6, warm_start=True)
    assert shares(model, seen) == pytest.approx(dict.fromkeys(cold, 0.6), abs=0.01)


def test_gates_of_different_units_have_no_threshold_in_common():
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"]))
    tokengate.patch(model, ["fc1"], gate="fisher")
    with pytest.raises(TokenGateError, match="TokenGate and FisherGate by one threshold"):
        tokengate.calibrate(model, batches(), per_layer=False)


def test_a_share_that_no_threshold_of_all_closes_is_said_once():
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"]))
    same = torch.randn(8).expand(4, 10, 8)
    with pytest.warns(UnreachedSparsityWarning, match="'all layers'.*the same"):
        tokengate.calibrate(model, [same], 0.3, per_layer=False)


@pytest.mark.parametrize("sparsity", [0.25, 0.7])
def test_one_threshold_for_all_leaves_open_what_does_nothing_yet(sparsity):
    """It would be closed for good."""
    model = tokengate.patch(Net(), ["fc1"])
    first, second = tokengate.layers(model).values()
    torch.nn.init.normal_(first.modification.B)
    x = torch.randn(40, 10, 8)
    found = tokengate.calibrate(model, [x], sparsity, per_layer=False)
    assert [tau > 0 for tau in found.values()] == [True, False]
    assert shares(model, x)["blocks.0.fc1"] == pytest.approx(sparsity, abs=0.01)
    model.train()(x).sum().backward()
    assert second.modification.B.grad.any()
