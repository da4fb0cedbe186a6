"""select and modification_norms: Table 4's rows, from a measured run to the next patch."""

import json
import math
import re

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation, one_sentence, padded_bert, snapshot
from torch import nn

import tokengate
from tokengate.patterns import FullName
from tokengate.reports.report import ModuleSparsity

FOUR = {"a.q": 0.5, "a.v": 0.1, "b.q": 0.9, "b.v": 0.1}


def report(sparsities):
    return tokengate.SparsityReport(
        {name: ModuleSparsity(number, 1, 10, 5, 0.1) for name, number in sparsities.items()}
    )


@pytest.mark.parametrize("given_as", [report, dict])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["a.v", "b.v"]),
        ({"keep": "highest"}, ["a.q", "b.q"]),
        ({"fraction": 0.75}, ["a.q", "a.v", "b.v"]),
        ({"fraction": 0.25}, ["a.v"]),  # of the two at 0.1 the first
        ({"fraction": 0.75, "keep": "highest"}, ["a.q", "a.v", "b.q"]),
        ({"fraction": 0.001}, ["a.v"]),
        ({"fraction": 1}, list(FOUR)),
        ({"fraction": 0.6}, ["a.v", "b.v"]),  # 2.4 of four
    ],
)
def test_longhand(given_as, options, wanted):
    assert tokengate.select(given_as(FOUR), **options) == wanted


def test_random_draws_differ_by_seed_and_are_the_same_again():
    names = {f"layers.{i}.q": 0.0 for i in range(12)}
    draws = [tuple(tokengate.select(names, by="random", seed=seed)) for seed in range(20)]
    assert draws == [tuple(tokengate.select(names, by="random", seed=s)) for s in range(20)]
    assert len(set(draws)) > 15
    assert {len(draw) for draw in draws} == {6}
    assert set().union(*draws) == set(names)
    # A module that was never called can be drawn.
    assert tokengate.select({"a": math.nan}, by="random") == ["a"]


numbers = st.dictionaries(
    st.from_regex(r"[ab]\.[0-9]\.[qv]", fullmatch=True),
    st.floats(0, 1) | st.just(math.inf),
    min_size=1,
)
BY = st.sampled_from(["sparsity", "random"])
KEEP = st.sampled_from(["lowest", "highest"])


@given(measured=numbers, by=BY, keep=KEEP, f=st.floats(0.001, 1), g=st.floats(0.001, 1))
@settings(max_examples=many(200), deadline=None)
def test_a_smaller_fraction_is_within_a_larger_one(measured, by, keep, f, g):
    less, more = (tokengate.select(measured, h, by, keep) for h in sorted((f, g)))
    assert set(less) <= set(more)
    assert 1 <= len(less) <= len(more) <= len(measured)
    # In the model's order, and nothing left out is better than what was kept.
    assert more == [name for name in measured if name in more]
    if by == "sparsity":
        sign = 1 if keep == "lowest" else -1
        kept = [sign * measured[name] for name in less]
        assert all(max(kept) <= sign * measured[n] for n in measured.keys() - set(less))


@given(
    values=st.lists(st.floats(0, 1), min_size=2, max_size=20, unique=True),
    count=st.data(),
    by=BY,
)
@settings(max_examples=many(100), deadline=None)
def test_lowest_and_highest_divide_the_modules(values, count, by):
    measured = {f"layers.{i}": value for i, value in enumerate(values)}
    few = count.draw(st.integers(1, len(values) - 1))
    low = tokengate.select(measured, few / len(values), by, "lowest")
    high = tokengate.select(measured, 1 - few / len(values), by, "highest")
    assert len(low) == few
    assert set(low).isdisjoint(high)
    assert set(low) | set(high) == set(measured)


class Nested(nn.Module):
    """Some names end like others: `0`, `fc`, and `fc.0` mean several layers as suffixes."""

    def __init__(self):
        super().__init__()
        self.add_module("0", nn.Linear(8, 8))
        self.fc = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.inner = nn.ModuleDict({"fc": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})
        self.add_module("a[b]*", nn.Linear(8, 8))

    def forward(self, x):
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                x = layer(x)
        return x


@given(seed=st.integers(0, 10**6), fraction=st.floats(0.01, 1))
@settings(max_examples=many(50), deadline=None)
def test_the_next_patch_adapts_these_modules_and_no_other(seed, fraction):
    model = tokengate.patch(Nested(), "all-linear", tau=0.5)
    with tokengate.record(model) as rec:
        model(torch.randn(2, 3, 8))
    names = tokengate.select(rec.report(), fraction, by="random", seed=seed)
    assert list(tokengate.layers(tokengate.patch(Nested(), names))) == names


def test_as_plain_strings_names_are_suffixes():
    exact = tokengate.select({"fc.0": 0.0})
    assert exact == ["fc.0"]
    assert json.loads(json.dumps(exact)) == ["fc.0"]
    assert list(tokengate.layers(tokengate.patch(Nested(), exact))) == ["fc.0"]
    assert list(tokengate.layers(tokengate.patch(Nested(), ["fc.0"]))) == ["fc.0", "inner.fc.0"]


def test_full_names_decide_wherever_patterns_do():
    exclude = [FullName("0"), FullName("fc")]  # a module's name leaves out all inside it
    model = tokengate.patch(Nested(), "all-linear", exclude=exclude)
    assert list(tokengate.layers(model)) == ["inner.fc.0", "inner.fc.1", "a[b]*"]
    ranks = {FullName("inner.fc.0"): 2, "*": 3}
    model = tokengate.patch(Nested(), "all-linear", rank=ranks)
    found = {name: layer.modification.rank for name, layer in tokengate.layers(model).items()}
    assert found.pop("inner.fc.0") == 2
    assert set(found.values()) == {3}
    with one_sentence("'q'", "matches no module"):
        tokengate.patch(Nested(), [FullName("q")])


def test_a_layer_that_is_the_model_and_slices_have_their_names():
    layer = tokengate.patch(nn.Linear(8, 8), "all-linear")
    with tokengate.record(layer) as rec:
        layer(torch.randn(2, 3, 8))
    names = tokengate.select(rec.report())
    assert list(tokengate.layers(tokengate.patch(nn.Linear(8, 8), names))) == [""]
    with one_sentence("not a list of names"):
        tokengate.patch(nn.Linear(8, 8), [""])

    divided = {"slices": {"q_proj": tokengate.Slices(a=4, b=4)}}
    model = tokengate.patch(Net(), ["q_proj.a", "q_proj.b"], **divided)
    with tokengate.record(model) as rec:
        model(torch.randn(2, 3, 8))
    names = tokengate.select(rec.report(), by="random", seed=1)
    assert list(tokengate.layers(tokengate.patch(Net(), names, **divided))) == names


def test_a_selection_is_kept_in_a_saved_adapter(tmp_path):
    model = tokengate.patch(Nested(), tokengate.select({"fc.0": 0.0}))
    tokengate.save(model, tmp_path)
    loaded = Nested()
    tokengate.load(loaded, tmp_path)
    assert list(tokengate.layers(loaded)) == ["fc.0"]


@pytest.mark.parametrize(
    ("measured", "options", "words"),
    [
        (FOUR, {"fraction": 0}, "fraction=0 is not in (0, 1]"),
        (FOUR, {"fraction": 50}, "fraction=50 is not in (0, 1]"),
        (FOUR, {"fraction": math.nan}, "fraction=nan is not a finite number"),
        (FOUR, {"by": "size"}, "choose one of sparsity, fisher, random"),
        (FOUR, {"by": "norm_relative"}, "modification_norms(model, batches).relative"),
        (FOUR, {"by": "norm_abs"}, "modification_norms(model, batches).absolute"),
        (FOUR, {"keep": "low"}, "choose one of lowest, highest"),
        (FOUR, {"by": "random", "seed": -1}, "seed=-1 is not a whole number"),
        ({**FOUR, "c": math.nan}, {}, "'c' has nan in place of a number"),
        ({**FOUR, "c": None}, {}, "'c' has None in place of a number"),
        (report({**FOUR, "c": math.nan}), {}, "never called"),
        ({}, {}, "select was given {}"),
        (report({}), {}, "select was given"),
        (["a.q"], {}, "select was given ['a.q']"),
    ],
)
def test_bad_input_is_one_sentence(measured, options, words):
    with one_sentence(words):
        tokengate.select(measured, **options)


# modification_norms


def dense(layer, x):
    """M(x) and W0 x of one layer, in float64, from dense matrices."""
    m, W0 = layer.modification, layer.weight.detach().double()
    p = {name: value.detach().double() for name, value in m.named_parameters()}
    x = x.double()
    kind = type(m).__name__
    if kind == "Adapter":
        return m.scale * torch.relu(x @ p["D"].T) @ p["U"].T, x @ W0.T
    if kind == "AdaLoRA":
        change = m.scale * p["P"] @ torch.diag(p["E"]) @ p["Q"]
    else:
        change = m.scale * p["B"] @ p["A"]
    if kind == "DoRA":
        merged = W0 + change
        change = p["magnitude"].unsqueeze(1) * merged / merged.norm(dim=1, keepdim=True) - W0
    return x @ change.T, x @ W0.T


METHODS = ["lora", "dora", "adalora", "adapter"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", [{"gate": False}, {"tau": 0.8}])
@pytest.mark.parametrize("method", METHODS)
def test_norms_are_those_of_dense_matrices(method, gate, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias=bias))
    tokengate.patch(model, ["0"], method=method, rank=3, dropout=0.4, **gate)
    away_from_initialisation(model, 0.3)
    data = [torch.randn(2, 5, 6), torch.randn(3, 2, 6)]
    norms = tokengate.modification_norms(model, data)
    absolute, relative = [], []
    for x in data:
        m, w = dense(model[0], x)
        absolute += m.norm(dim=-1).mean(1).tolist()
        relative += (m.norm(dim=-1) / w.norm(dim=-1)).mean(1).tolist()
    # Every sample weighs the same: 5 samples, not 16 positions.
    assert norms.absolute == {"0": pytest.approx(sum(absolute) / 5, rel=1e-5)}
    assert norms.relative == {"0": pytest.approx(sum(relative) / 5, rel=1e-5)}
    assert norms.absolute != norms.relative


def test_a_method_without_parameters_has_norms():
    class Half(tokengate.Modification):
        def reset_parameters(self):
            pass

        def forward(self, x, w):
            return 0.5 * w

    model = nn.Sequential(nn.Linear(6, 9))
    tokengate.patch(model, ["0"], method=Half, gate=False)
    norms = tokengate.modification_norms(model, [torch.randn(2, 5, 6)])
    assert norms.relative == {"0": pytest.approx(0.5)}
    assert model[0].gate is None


def test_a_method_of_ones_own_has_norms_by_hand():
    class Twice(tokengate.Modification):
        def __init__(self, linear):
            super().__init__(linear)
            self.gain = self.new_parameter(1)

        def reset_parameters(self):
            nn.init.zeros_(self.gain)

        def forward(self, x, w):
            return self.gain * w

    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    tokengate.patch(model, ["0"], method=Twice)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].modification.gain.fill_(2.0)
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    norms = tokengate.modification_norms(model, [x])
    # Where W0 x = 0 and M(x) = 0 nothing was modified.
    assert norms == tokengate.reports.ModificationNorms({"0": 1.0}, {"0": 5.0})


def test_a_modification_of_nothing_is_infinitely_large():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    tokengate.patch(model, ["0"], rank=1, gate=False)
    away_from_initialisation(model)
    nn.init.zeros_(model[0].weight)
    norms = tokengate.modification_norms(model, [torch.randn(1, 3, 2)])
    assert norms.relative == {"0": math.inf}
    assert 0 < norms.absolute["0"] < math.inf
    assert tokengate.select({"1": 5.0, **norms.relative}, keep="highest") == ["0"]


def test_of_numbers_that_grow_with_importance_the_highest_are_kept():
    """Without keep= the layers that mattered least were named."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tokengate.patch(model, "all-linear", rank=1, gate=False)
    away_from_initialisation(model)
    model[0].modification.B.data.mul_(100)
    x = torch.randn(1, 3, 2)
    norms = tokengate.modification_norms(model, [x])
    scores = tokengate.fisher_scores(model, [x], lambda model, x: model(x).square().sum())
    for numbers in (norms.relative, norms.absolute, scores):
        highest = [max(numbers, key=numbers.get)]
        assert tokengate.select(numbers) == highest
        assert tokengate.select(numbers, keep="lowest") == [min(numbers, key=numbers.get)]
        assert tokengate.select(dict(numbers)) != highest  # of which nothing is known


def test_padding_does_not_count():
    model, batch, alone = padded_bert(gate=False)
    padded = tokengate.modification_norms(model, [batch])
    apart = tokengate.modification_norms(model, alone)
    assert padded.relative == pytest.approx(apart.relative, rel=1e-5)
    assert padded.absolute == pytest.approx(apart.absolute, rel=1e-5)
    unmasked = tokengate.modification_norms(model, [{"input_ids": batch["input_ids"]}])
    assert padded.absolute != pytest.approx(unmasked.absolute, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_padding_of_what_has_samples_second(method):
    """Torch's own encoder, (T, B, C): its norms and taus are those with the samples first."""

    def measured(batch_first):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        tokengate.patch(model, ["linear1"], method=method, rank=2)
        away_from_initialisation(model, 0.3)
        x = torch.randn(3, 5, 8)
        padding = torch.arange(5) >= torch.tensor([[2], [5], [4]])
        batch = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": padding}
        return (
            tokengate.modification_norms(model, [batch]),
            tokengate.calibrate(model, [batch]),
            tokengate.modification_norms(model, [{"src": batch["src"]}]),
        )

    first, second = measured(True), measured(False)
    assert second[0].relative == pytest.approx(first[0].relative, rel=1e-5)
    assert second[0].absolute == pytest.approx(first[0].absolute, rel=1e-5)
    assert second[1] == pytest.approx(first[1], rel=2e-3)
    assert first[0].relative != pytest.approx(first[2].relative, rel=1e-3)


@pytest.mark.parametrize("gate", [{"gate": False}, {"tau": 0.5}])
def test_nothing_of_the_model_changes(gate):
    model = tokengate.patch(Net(), ["q_proj", "fc1"], dropout=0.5, **gate).train()
    away_from_initialisation(model)
    model.blocks[1].eval()
    data = [torch.randn(2, 3, 8)]
    model(data[0])  # what the first forward leaves
    before = snapshot(model)
    first = tokengate.modification_norms(model, data)
    assert snapshot(model) == before
    assert tokengate.modification_norms(model, data) == first
    with pytest.raises(RuntimeError):
        tokengate.modification_norms(model, [*data, torch.randn(2, 3, 7)])
    assert snapshot(model) == before
    with one_sentence("modification_norms was given no batches"):
        tokengate.modification_norms(model, [])
    assert snapshot(model) == before


def test_gates_act_and_count_nothing_out():
    """Norms are of M(x) at closed positions, too; later layers see what gates let through."""
    data = [torch.randn(2, 6, 8)]

    def norms(**gate):
        torch.manual_seed(1)
        model = tokengate.patch(Net(), ["q_proj"], **gate)
        return tokengate.modification_norms(away_from_initialisation(model), data).absolute

    torch.manual_seed(0)
    ungated, opened, closed = norms(gate=False), norms(tau=0.0), norms(tau=1e6)
    assert opened == ungated
    assert closed["blocks.0.q_proj"] == ungated["blocks.0.q_proj"] > 0
    assert closed["blocks.1.q_proj"] != ungated["blocks.1.q_proj"]


def test_what_cannot_be_measured_is_one_sentence():
    with one_sentence("modification_norms was asked of a Net without"):
        tokengate.modification_norms(Net(), [])
    model = tokengate.patch(Net(), ["q_proj"])
    with one_sentence("modification_norms was given"):
        tokengate.modification_norms(model, torch.randn(2, 3, 8))
    with (
        one_sentence("whose rows have their own adapters"),
        tokengate.use(model, ["default", None]),
    ):
        tokengate.modification_norms(model, [torch.randn(2, 3, 8)])


def test_the_docstring_has_a_call_for_every_row_of_table_4():
    rows = re.findall(r"\| (\w+) \| `select", tokengate.select.__doc__)
    assert rows == ["S_low", "S_high", "norm_relative", "norm_abs", "random", "fisher"]
