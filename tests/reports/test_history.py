"""History: tau, sparsity and loss over the steps of a training."""

import contextlib
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
from tokengate import History
from tokengate.errors import NonFiniteWarning
from tokengate.reports.report import ModuleSparsity, SparsityReport
from tokengate.sharding import numbers_here

Q, V = "blocks.0.q_proj", "blocks.1.v_proj"


def patched(**options):
    return tokengate.patch(Net(), [Q, V], **options)


def set_taus(model, *taus):
    for layer, tau in zip(tokengate.layers(model).values(), taus, strict=True):
        layer.gate.tau.data.fill_(tau)


def report(q, v):
    return SparsityReport({n: ModuleSparsity(s, 1, 4, 2, 0.0) for n, s in ((Q, q), (V, v))})


def test_what_is_kept():
    model = patched()
    history = History(model)
    set_taus(model, 0.25, -0.5)
    history.log(1, loss=torch.tensor(2.5, requires_grad=True), report=report(0.25, 0.75))
    set_taus(model, 0.5, 1.5)
    history.log(5, loss=2, report=report(0.5, math.nan))
    history.log(6)
    assert history.steps == [1, 5, 6]
    assert history.losses == [2.5, 2.0, None]
    assert history.taus == {Q: [0.25, 0.5, 0.5], V: [-0.5, 1.5, 1.5]}
    assert history.sparsities == {Q: [0.25, 0.5, None], V: [0.75, None, None]}
    assert history.sparsity == [0.5, 0.5, None]


def test_a_dict_of_it_stays_what_it_was():
    model = patched()
    history = History(model)
    history.log(1, loss=2.0)
    found = history.to_dict()
    before = json.dumps(found)
    history.log(2, loss=1.0)
    assert history.to_dict() != found
    assert json.dumps(found) == before


def test_of_a_training_it_is_what_each_step_left():
    model = away_from_initialisation(patched(penalty=1e-3))
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3, s=1e-2))
    history, expected = History(model), []
    for step in range(3):
        with tokengate.record(model) as rec:
            loss = model(torch.randn(2, 5, 8)).square().mean()
        loss.backward()
        optimizer.step()
        history.log(step, loss=loss, report=rec.report())
        expected.append(
            (loss.item(), rec.report().sparsity, model.blocks[0].q_proj.gate.tau.item())
        )
    assert list(zip(history.losses, history.sparsity, history.taus[Q], strict=True)) == expected
    assert len(set(history.taus[Q])) == 3


def test_all_taus_are_read_at_once(monkeypatch):
    """One `tolist` for the taus and the loss together, and no `item`."""
    model, reads = patched(), []
    history = History(model)
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.numel()) or tolist(t))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: reads.append("item"))
    history.log(0, loss=torch.tensor(1.0))
    assert reads == [3]


def test_numbers_that_are_not_here():
    there = torch.tensor([1.5], dtype=torch.float64)
    tensors = [torch.empty(1, device="meta"), there, torch.empty(0), nn.Parameter(torch.ones(1))]
    assert numbers_here(tensors) == [None, 1.5, None, 1.0]
    assert numbers_here(tensors[:1]) == [None]
    assert numbers_here([]) == []


def test_layers_without_a_gate_are_left_out():
    model = tokengate.patch(patched(), ["fc1"], gate=False)
    assert len(tokengate.layers(model)) == 4
    assert list(History(model).taus) == [Q, V]


@settings(max_examples=many(40), deadline=None)
@given(limit=st.integers(2, 12), calls=st.integers(0, 100))
def test_it_is_bounded_and_reaches_from_the_first_step_to_near_the_last(limit, calls):
    history = History(patched(), limit=limit)
    for step in range(calls):
        history.log(step)
    kept = history.steps
    assert len(kept) <= limit
    assert {len(c) for c in (*history.taus.values(), history.losses, history.sparsity)} == {
        len(kept)
    }
    if calls <= limit:
        assert kept == list(range(calls))
    else:
        assert kept[0] == 0
        gaps = [b - a for a, b in zip(kept, [*kept[1:], calls], strict=True)]
        assert max(gaps) <= 2 * calls / (limit - 1) + 1


def test_a_step_again_takes_the_place_of_what_came_after():
    model = patched()
    history = History(model)
    for step in (0, 10, 20, 30):
        set_taus(model, step, step)
        history.log(step)
    set_taus(model, 0.5, 0.5)
    history.log(15)
    assert history.steps == [0, 10, 15]
    assert history.taus[Q] == [0, 10, 0.5]
    # Also where calls are passed over.
    history = History(patched(), limit=2)
    for step in (0, 1, 2, 3):
        history.log(step)
    assert history.steps == [0, 2]
    history.log(1)
    assert history.steps == [0, 1]


def test_there_and_back(tmp_path):
    model = patched()
    history = History(model)
    history.log(1, loss=float("nan"), report=report(0.5, math.nan))
    set_taus(model, math.inf, 0.1)
    history.log(2, loss=1.0)
    history.save(tmp_path / "history.json")
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]
    text = (tmp_path / "history.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    again = History.load(tmp_path / "history.json")
    assert again.to_dict() == history.to_dict() == json.loads(text)
    assert again.losses == [None, 1.0]
    assert again.taus[Q] == [0, None]
    with one_sentence("without a model", "History.load(path, model)"):
        again.log(3)
    goes_on = History.load(tmp_path / "history.json", model)
    goes_on.log(3)
    assert goes_on.steps == [1, 2, 3]
    assert again.steps == [1, 2]


def test_a_longer_one_than_the_limit_is_thinned_out(tmp_path):
    model = patched()
    history = History(model)
    for step in range(10):
        history.log(step)
    history.save(tmp_path / "history.json")
    again = History.load(tmp_path / "history.json", model, limit=4)
    again.log(10)
    assert again.steps == [0, 4, 8, 10]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    history = History(patched())
    history.save(tmp_path / "history.json")
    before = (tmp_path / "history.json").read_text()
    history.log(1)
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        history.save(tmp_path / "history.json")
    assert (tmp_path / "history.json").read_text() == before


GOOD = {"steps": [1, 2], "losses": [0.5, None], "taus": {"a": [0, 1]}, "sparsities": {"a": [0, 1]}}


def test_the_good_file_is_good(tmp_path):
    (tmp_path / "history.json").write_text(json.dumps(GOOD))
    assert History.load(tmp_path / "history.json").to_dict() == GOOD


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{",
        "[" * 10000,
        json.dumps({k: v for k, v in GOOD.items() if k != "losses"}),
        json.dumps({**GOOD, "more": 1}),
        json.dumps({**GOOD, "steps": [2, 1]}),
        json.dumps({**GOOD, "steps": [1, 1]}),
        json.dumps({**GOOD, "steps": [1.0, 2.0]}),
        json.dumps({**GOOD, "steps": [1, 2, 3]}),
        json.dumps({**GOOD, "losses": [1, "2"]}),
        json.dumps({**GOOD, "losses": [1, True]}),
        json.dumps({**GOOD, "losses": [1, math.nan]}),
        json.dumps({**GOOD, "losses": [1, 10**400]}),
        json.dumps({**GOOD, "losses": [1, 1 << 63]}),
        json.dumps({**GOOD, "steps": [1, 1 << 63]}),
        json.dumps({**GOOD, "taus": {"a": [1.7e308, 1.7e308]}}),
        json.dumps({**GOOD, "sparsities": {"a": [0, 2]}}),
        json.dumps({**GOOD, "losses": "12"}),
        json.dumps({**GOOD, "taus": {"b": [0, 1]}}),
        json.dumps({**GOOD, "taus": [[0, 1]]}),
        json.dumps({**GOOD, "skipped": [1]}),
        json.dumps({**GOOD, "skipped": [0, -1]}),
        json.dumps({**GOOD, "skipped": [0, 1.5]}),
        json.dumps({**GOOD, "broken": {"b": 1}}),
        json.dumps({**GOOD, "broken": {"a": "1"}}),
        json.dumps({**GOOD, "broken": ["a"]}),
        json.dumps(GOOD)[:-1] + ', "steps": [1, 2]}',
    ],
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "history.json"
    path.write_text(text)
    with one_sentence(str(path), "history"):
        History.load(path)


def test_other_refusals(tmp_path):
    with one_sentence("History", "patch"):
        History(Net())
    with one_sentence("History", "no gates", "gate='threshold'"):
        History(patched(gate=False))
    with one_sentence("limit=1", ">= 2"):
        History(patched(), limit=1)
    with one_sentence("does-not-exist", "could not be read", "saved history"):
        History.load(tmp_path / "does-not-exist")
    history = History(patched())
    with one_sentence("step=-1"):
        history.log(-1)
    with one_sentence("loss", "(2,)"):
        history.log(1, loss=torch.ones(2))
    with one_sentence("loss='0.5'", "no number"):
        history.log(1, loss="0.5")
    with one_sentence("History.log", "Net", "rec.report()"):
        history.log(1, report=Net())
    assert history.to_dict() == History(patched()).to_dict()
    history.save(tmp_path / "made" / "history.json")
    assert (tmp_path / "made" / "history.json").exists()
    history.save(tmp_path / "history.json")
    other = tokengate.patch(Net(), [Q])
    with one_sentence(V, "patched when the history was saved"):
        History.load(tmp_path / "history.json", other)


@pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")
def test_what_went_wrong_is_kept(tmp_path):
    model = patched()
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1))
    history = History(model)
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 8)).sum().backward()
        if step in (1, 4):
            model.blocks[0].q_proj.gate.tau.grad.fill_(math.nan)
        with pytest.warns(NonFiniteWarning) if step == 1 else contextlib.nullcontext():
            optimizer.step()
        history.log(step)
    assert (history.skipped, history.broken) == ([0, 1, 1, 1, 2, 2], {})
    assert None not in history.taus[Q]
    set_taus(model, 0.1, math.nan)
    history.log(6)
    history.log(7)
    assert history.broken == {V: 6}
    assert history.taus[V][-2:] == [None, None]
    history.save(tmp_path / "history.json")
    again = History.load(tmp_path / "history.json", model)
    assert again.to_dict() == history.to_dict()
    set_taus(model, 0.1, 0.2)
    again.log(5)
    assert (again.steps, again.skipped, again.broken) == (
        [0, 1, 2, 3, 4, 5],
        [0, 1, 1, 1, 2, 2],
        {},
    )
