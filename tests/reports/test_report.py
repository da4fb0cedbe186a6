"""SparsityReport: samples, places and histograms; adding up, comparing, saving."""

import json
import math

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation, one_sentence
from torch import nn

import tokengate
from tokengate.reports.histogram import RATIO_EDGES, histogram_of
from tokengate.reports.module_sparsity import ModuleSparsity

EVERYTHING = {"positions": True, "ratios": True}


class Masked(nn.Module):
    """(B, T, 8) -> (B, T, 8); `late` sees the first sample alone."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.late = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, inputs_embeds, attention_mask=None):
        h = self.v_proj(torch.tanh(self.q_proj(inputs_embeds)))
        return h if attention_mask is not None else h[:1] + self.late(h[:1])


def patched(**options):
    torch.manual_seed(0)
    model = tokengate.patch(Masked(), ["q_proj", "v_proj", "late"], tau=1.0, **options)
    away_from_initialisation(model)
    run(model, 0, 2)  # the first forward warns of layers that it misses
    return model


def run(model, seed, length):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, length, generator=draw) < 0.7
    with torch.no_grad():
        model(torch.randn(3, length, 8, generator=draw), attention_mask=mask if seed % 2 else None)


def recorded(model, runs, **options):
    with tokengate.record(model, **options) as rec:
        for seed, length in runs:
            run(model, seed, length)
    return rec.report()


RUNS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=many(40))
@given(RUNS, RUNS, RUNS, st.sampled_from([{}, {"ratios": True}, {"positions": True}, EVERYTHING]))
def test_reports_add_up_to_that_of_one_recording(a, b, c, options):
    model = patched()
    first, second, third = (recorded(model, runs, **options) for runs in (a, b, c))
    whole = recorded(model, [*a, *b, *c], **options)
    assert whole.to_dict() != first.to_dict()
    assert first.merge(second).merge(third).to_dict() == whole.to_dict()
    assert first.merge(second.merge(third)).to_dict() == whole.to_dict()


def test_adding_up_uneven_reports():
    """Taus are the later's, details that one alone has go, modules of one alone stay."""
    a = ModuleSparsity(0.5, 2, 8, 4, 0.1, by_sample=(0.5, 0.5))
    b = ModuleSparsity(1.0, 1, 4, 0, 0.2)
    uncalled = ModuleSparsity(math.nan, 0, 0, 0, None)
    merged = tokengate.SparsityReport({"x": a, "y": a, "z": a}).merge(
        tokengate.SparsityReport({"x": b, "z": uncalled, "w": b})
    )
    assert merged.modules == {
        "x": ModuleSparsity(2 / 3, 3, 12, 4, 0.2),
        "y": a,
        "z": a,
        "w": b,
    }


def test_what_was_added_up_stays_as_it_was():
    one = tokengate.SparsityReport({"x": ModuleSparsity(0.5, 1, 2, 1, None)}, {"date": "today"})
    both = tokengate.SparsityReport({}).merge(one)
    assert both.about == {"date": "today"}
    both.about["date"] = "tomorrow"
    both.modules.clear()
    assert (one.about, list(one.modules)) == ({"date": "today"}, ["x"])


def test_by_sample_and_by_position_are_those_of_the_samples():
    model = patched()
    with tokengate.record(model, positions=True) as rec:
        for seed, length in [(1, 5), (3, 9), (5, 2)]:
            run(model, seed, length)
    report, names = rec.report(), ["q_proj", "v_proj"]
    closed, there = [0] * 9, [0] * 9
    for sample, found in zip(rec.samples, report.by_sample(), strict=True):
        real = [sample.is_open[name][sample.real].tolist() for name in names]
        shares = [1 - sum(opened) / len(opened) for opened in real if opened]
        assert found == pytest.approx(sum(shares) / 2) if shares else math.isnan(found)
        for opened in real:
            for place, each in enumerate(opened):
                there[place] += 1
                closed[place] += not each
    longest = max(place + 1 for place in range(9) if there[place])
    wanted = [c / n for c, n in zip(closed[:longest], there[:longest], strict=True)]
    assert report.by_position() == pytest.approx(wanted)
    assert len({round(each, 3) for each in report.by_position()}) > 1
    assert report.by_position(["q_proj"]) != report.by_position(["v_proj"])
    assert report.modules["q_proj"].by_sample != report.modules["v_proj"].by_sample


def test_padding_is_at_no_place_and_of_no_sample():
    model = patched()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    with tokengate.record(model, positions=True) as rec, torch.no_grad():
        model(torch.randn(3, 4, 8), attention_mask=mask)
    module = rec.report().modules["q_proj"]
    assert [positions for positions, _ in module.by_position] == [2, 2, 1]
    assert (module.samples, len(module.by_sample), module.by_sample[2]) == (2, 3, None)
    assert math.isnan(rec.report().by_sample()[2])


def test_a_histogram_counts_every_position_once():
    model = patched()
    runs = [(1, 8), (3, 8)]
    with tokengate.record(model, **EVERYTHING) as rec:
        for seed, length in runs:
            run(model, seed, length)
    report = rec.report()
    found = report.histogram("r", ["q_proj"])
    assert found.edges == RATIO_EDGES
    assert found.total == report.modules["q_proj"].positions
    real = [sample.ratios["q_proj"][sample.real].float() for sample in rec.samples]
    # r was counted before it was rounded to 16 bits: by one bin at most in another one.
    wanted = [0] * len(found.counts)
    for r in torch.cat(real).tolist():
        wanted[sum(edge <= r for edge in RATIO_EDGES)] += 1
    assert sum(abs(a - b) for a, b in zip(found.counts, wanted, strict=True)) <= 2
    assert max(found.counts) < found.total
    both = report.histogram()
    assert both.total == sum(m.positions for m in report.modules.values())
    assert recorded(model, runs, ratios=True).histogram() == both


def test_edges_belong_to_the_bin_above_and_what_is_outside_is_counted():
    from tokengate.reports.histogram import count_ratios

    r = torch.tensor([0.0, 2.0**-25, 2.0**-24, 1.0, 2.0**16, math.inf, 3.0])
    real = torch.tensor([True] * 6 + [False])
    counts = count_ratios(r.unsqueeze(0), real.unsqueeze(0)).tolist()
    one = RATIO_EDGES.index(1.0) + 1
    assert {at: n for at, n in enumerate(counts) if n} == {0: 2, 1: 1, one: 1, 161: 2}


def test_groups_have_their_own_histograms():
    model = patched()

    def halves(name, shape):
        early = torch.arange(shape[1]).expand(shape) < 3
        return {"early": early, "late": ~early}

    with tokengate.record(model, ratios=True, groups=halves) as rec:
        run(model, 1, 8)
    parts, whole = rec.reports(), rec.report().histogram()
    counts = [parts[group].histogram().counts for group in ("early", "late")]
    assert all(map(sum, counts))
    assert tuple(map(sum, zip(*counts, strict=True))) == whole.counts


def test_histogram_of_tau():
    modules = {n: ModuleSparsity(0.5, 1, 2, 1, tau) for n, tau in [("a", -1.0), ("b", 1.0)]}
    modules |= {"c": ModuleSparsity(0.5, 1, 2, 1, 1.0), "d": ModuleSparsity(0.0, 1, 2, 2, None)}
    found = tokengate.SparsityReport(modules).histogram("tau")
    assert (found.total, len(found.edges), found.edges[0]) == (3, 21, -1.0)
    assert (found.counts[0], found.counts[1], found.counts[-2:]) == (0, 1, (2, 0))
    assert histogram_of([0.3, 0.3]).counts == (0, 2, 0)


def test_what_was_not_recorded_is_said():
    model = patched()
    report = recorded(model, [(1, 5)])
    with one_sentence("by_sample", "any module", "positions=True"):
        report.by_sample()
    with one_sentence("by_position", "positions=True"):
        report.by_position()
    with one_sentence("ratios", "ratios=True"):
        report.histogram()
    with one_sentence("of='x'", "r, tau"):
        report.histogram("x")
    report = recorded(model, [(0, 5)], **EVERYTHING)
    with one_sentence("'q_proj' with 3 samples and 'late' with 1"):
        report.by_sample()
    assert len(report.by_sample(["late"])) == 1
    with one_sentence("'nowhere'", "3 modules"):
        report.by_position(["nowhere"])
    with one_sentence("no module"):
        report.histogram("r", [])
    ungated = recorded(patched(gate=False), [(1, 5)], **EVERYTHING)
    with one_sentence("ratios was asked of any module"):
        ungated.histogram()


@settings(deadline=None, max_examples=many(15))
@given(RUNS, st.sampled_from([{}, EVERYTHING]))
def test_saved_and_loaded_it_is_the_same(tmp_path_factory, runs, options):
    path = tmp_path_factory.mktemp("reports") / "report.json"
    report = recorded(patched(), runs, **options)
    report.save(path)
    loaded = tokengate.SparsityReport.load(str(path))
    assert loaded.to_dict() == report.to_dict()
    assert str(loaded) == str(report)
    for name, module in report.modules.items():
        if module.samples:
            assert loaded.modules[name] == module
    assert list(path.parent.iterdir()) == [path]


def test_saving_leaves_what_was_there_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    report = recorded(patched(), [(1, 5)])
    report.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report.merge(report).save(path)
    assert path.read_bytes() == before
    with one_sentence(str(tmp_path), "which is a folder"):
        report.save(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_of_a_saved_report_is_made(tmp_path):
    report = recorded(patched(), [(1, 5)])
    path = tmp_path / "one" / "two" / "report.json"
    report.save(path)
    assert tokengate.SparsityReport.load(path).to_dict() == report.to_dict()


@pytest.mark.parametrize("tau", [math.nan, math.inf, -math.inf])
def test_a_tau_that_is_not_finite_can_be_saved_compared_and_counted(tmp_path, tau):
    good, bad = ModuleSparsity(0.5, 1, 2, 1, 0.1), ModuleSparsity(0.5, 1, 2, 1, tau)
    report = tokengate.SparsityReport({"a": good, "b": bad})
    report.save(tmp_path / "report.json")
    loaded = tokengate.SparsityReport.load(tmp_path / "report.json")
    text = json.loads((tmp_path / "report.json").read_text())["modules"]["b"]
    assert (text["tau"], text["broken_tau"]) == (None, str(tau))
    # What was read is what was saved, in every form.
    assert str(loaded.modules["b"].tau) == str(tau)
    assert loaded.to_dict() == report.to_dict()
    assert loaded.to_csv() == report.to_csv()
    assert str(loaded.compare(loaded)) == str(report.compare(report))
    assert loaded.histogram("tau") == report.histogram("tau")
    for each in (report, loaded, report.merge(loaded), loaded.merge(report)):
        assert each.broken_taus == {"b": str(tau)}
        assert f"tau is not finite in b ({tau})" in str(each)
        assert f"b ({tau})" in each._repr_html_()
    healed = report.merge(tokengate.SparsityReport({"a": good, "b": good}))
    assert healed.broken_taus == {}
    assert "not finite" not in str(healed)
    assert json.dumps(report.compare(report).to_dict(), allow_nan=False)
    found = report.histogram("tau")
    assert (found.total, found.edges[0]) == (2, 0.1)
    assert found.counts == ((1, 1, 0) if tau < 0 else (0, 1, 1))
    assert report.histogram("tau", ["b"]).total == 1


def test_a_place_that_nothing_was_at_has_no_share(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(file_of({**GOOD, "by_position": [[2, 1], [0, 0]]}))
    first, second = tokengate.SparsityReport.load(path).by_position()
    assert first == 0.5
    assert math.isnan(second)


def test_what_is_no_report_is_said():
    report = recorded(patched(), [(1, 5)])
    with one_sentence("merge was given 'a.json'", "SparsityReport.load"):
        report.merge("a.json")
    with one_sentence("compare was given None", "rec.report()"):
        report.compare(None)


GOOD = {"sparsity": 0.5, "samples": 1, "positions": 2, "modified": 1, "tau": 0.1}


def file_of(module):
    return json.dumps(
        {"format": "tokengate report", "format_version": 1, "modules": {"x.y": module}}
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no JSON"]),
        (file_of(GOOD)[:-9], ["no JSON"]),
        (file_of(GOOD).replace("0.5", "NaN"), ["no JSON", "NaN"]),
        ("[]", ["instead of an object"]),
        ("{}", ["no report of version 1"]),
        (file_of(GOOD).replace(": 1,", ": 2,", 1), ["no report of version 1"]),
        (file_of(3), ["'x.y'", "no object"]),
        (file_of({**GOOD, "sparsity": 1.5}), ["'sparsity'", "0 to 1"]),
        (file_of({**GOOD, "samples": True}), ["'samples'", "whole number"]),
        (file_of({**GOOD, "modified": 3}), ["more modified positions"]),
        (file_of({**GOOD, "sparsity": None}), ["samples without a sparsity"]),
        (file_of({**GOOD, "tau": "0"}), ["'tau'"]),
        (file_of({**GOOD, "tau": None, "broken_tau": "x"}), ["'broken_tau'", "nan, inf"]),
        (file_of({**GOOD, "tau": None, "broken_tau": 1}), ["'broken_tau'"]),
        (file_of({**GOOD, "broken_tau": "nan"}), ["finite"]),
        (file_of({**GOOD, "tau": 10**400}), ["more than 64 bits"]),
        (file_of({**GOOD, "tau": 1e300}), ["'tau'", "finite"]),
        (file_of({**GOOD, "samples": 1 << 63}), ["more than 64 bits"]),
        (file_of({**GOOD, "sparsity": 1 << 62}), ["'sparsity'"]),
        (file_of(GOOD).replace("0.5", "[1e999]"), ["no JSON", "not finite"]),
        (file_of(GOOD).replace("x.y", "\\ud800"), ["no JSON"]),
        (file_of({**GOOD, "extra": 1}), ["unknown 'extra'"]),
        (file_of({k: v for k, v in GOOD.items() if k != "tau"}), ["no 'tau'"]),
        (file_of({**GOOD, "ratios": [1, 2]}), ["'ratios'", "162 counts"]),
        (file_of({**GOOD, "by_sample": [2]}), ["'by_sample'"]),
        (file_of({**GOOD, "by_position": [[1, 2]]}), ["'by_position'"]),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, words):
    path = tmp_path / "report.json"
    path.write_text(file_of(GOOD))
    assert tokengate.SparsityReport.load(path).sparsity == 0.5
    path.write_text(text)
    with one_sentence(str(path), *words):
        tokengate.SparsityReport.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with one_sentence("nowhere.json could not be read"):
        tokengate.SparsityReport.load(tmp_path / "nowhere.json")


def test_compare():
    def report(**sparsities):
        return tokengate.SparsityReport(
            {
                n: ModuleSparsity(s, 0 if math.isnan(s) else 1, 10, 5, tau)
                for n, (s, tau) in sparsities.items()
            }
        )

    a = report(q=(0.5, 0.1), k=(0.5, None), v=(math.nan, 0.1), o=(0.5, 0.1))
    b = report(q=(0.6, 0.12), k=(0.1, 0.2), v=(0.5, 0.1), up=(0.2, 0.1))
    found = a.compare(b)
    assert list(found.modules) == ["k", "q", "v"]
    assert (found.only_in_a, found.only_in_b) == (["o"], ["up"])
    assert found.change == pytest.approx((0.1 - 0.4) / 2)
    assert str(found).splitlines() == [
        "sparsity (%)",
        "module     a     b  change  tau in a  tau in b",
        "k       50.0  10.0   -40.0         -       0.2",
        "q       50.0  60.0   +10.0       0.1      0.12",
        "v          -  50.0       -       0.1       0.1",
        "only in a: o",
        "only in b: up",
    ]
    assert found.to_markdown().splitlines()[2] == "| k | 50.0 | 10.0 | -40.0 | - | 0.2 |"
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["modules"]["v"] == {"sparsity": [None, 0.5], "change": None, "tau": [0.1, 0.1]}
    same = a.compare(a)
    assert [module.change for module in same.modules.values()][:3] == [0, 0, 0]


def test_a_fresh_modification_has_r_0():
    model = tokengate.patch(Net(), ["q_proj"])
    with tokengate.record(model, ratios=True) as rec:
        model(torch.randn(2, 3, 8))
    assert rec.report().histogram().counts[0] == 2 * 2 * 3
