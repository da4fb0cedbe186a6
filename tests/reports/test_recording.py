"""record and SparsityReport: eq. 23."""

import csv
import dataclasses
import io
import json
import math

import pytest
import reference
import torch
from models import Net, away_from_initialisation, one_sentence
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.reports.report import ModuleSparsity


def patched(**options):
    return away_from_initialisation(tokengate.patch(Net(), ["q_proj", "v_proj"], **options))


@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 2, 5, 8), (7, 8), (8,)])
def test_equals_eq_23(shape):
    model = patched(tau=1.0)
    with tokengate.record(model, positions=True) as rec:
        model(torch.randn(shape))
        model(torch.randn(shape))
    report = rec.report()
    for name, calls in rec.positions.items():
        assert [tuple(s.shape) for s in calls] == [shape[:-1]] * 2
        samples = [row.flatten().tolist() for s in calls for row in (s if s.dim() else s[None])]
        assert report.by_module[name] == pytest.approx(reference.sparsity(samples))
        module = report.modules[name]
        assert module.samples == len(samples)
        assert module.positions == sum(map(len, samples))
        assert module.modified == sum(map(sum, samples))
    assert report.sparsity == pytest.approx(sum(report.by_module.values()) / 4)
    if shape == (4, 6, 8):
        assert 0 < report.sparsity < 1


def test_samples_weigh_the_same_whatever_their_length():
    layer = nn.Linear(2, 2, bias=False)
    tokengate.patch(layer, "all-linear", rank=1, scale=1.0, tau=0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.modification.A.copy_(torch.tensor([[1.0, 0.0]]))
        layer.modification.B.copy_(torch.tensor([[1.0], [0.0]]))
    opened, closed = [1.0, 0.0], [0.0, 1.0]
    with tokengate.record(layer) as rec:
        layer(torch.tensor([[opened, closed, closed, closed]]))
        layer(torch.tensor([[opened]]))
    report = rec.report()
    assert report.sparsity == pytest.approx((3 / 4 + 0) / 2)
    assert report.token_sparsity == pytest.approx(3 / 5)


def test_open_and_closed_and_ungated():
    for options, wanted in [({"tau": -1.0}, 0.0), ({"tau": 1e6}, 1.0), ({"gate": False}, 0.0)]:
        model = patched(**options)
        with tokengate.record(model) as rec:
            model(torch.randn(2, 3, 8))
        assert set(rec.report().by_module.values()) == {wanted}


def test_nothing_is_counted_outside_or_disabled_and_nothing_is_left():
    model = patched()
    keys = sorted(model.blocks[0].q_proj.__dict__)
    x = torch.randn(2, 3, 8)
    with tokengate.record(model) as outer:
        with tokengate.record(model) as inner, tokengate.disabled(model):
            model(x)
        model(x)
    model(x)
    assert outer.report().modules["blocks.0.q_proj"].positions == 6
    with pytest.raises(
        tokengate.TokenGateError, match="nothing was recorded: run the model inside"
    ):
        inner.report()
    assert sorted(model.blocks[0].q_proj.__dict__) == keys


def halves(name, shape):
    """The first three positions of each of two samples, but none of the second one's; the rest."""
    first = torch.zeros(2, 6, dtype=torch.bool)
    first[0, :3] = True
    if name.endswith("v_proj"):
        return {"first": False, "rest": True}
    return {"first": first, "rest": ~first}


def assert_counts_equal(detailed, plain):
    """But for what positions are recorded for."""
    left = {
        name: dataclasses.replace(module, by_sample=None, by_position=None)
        for name, module in detailed.modules.items()
    }
    assert left != detailed.modules
    assert left == plain.modules


@pytest.mark.parametrize("flat", [False, True])
def test_groups_of_positions_add_up(flat):
    model = patched(tau=1.0)
    x = torch.randn(2, 6, 8)
    with (
        tokengate.record(model, positions=True, groups=halves) as rec,
        tokengate.record(model) as a,
    ):
        model(x.flatten(0, 1) if flat else x)
    total, parts = a.report(), rec.reports()
    assert_counts_equal(rec.report(), total)
    assert list(parts) == ["first", "rest"]
    # What has positions in other groups alone is not in the report.
    assert list(parts["first"].modules) == ["blocks.0.q_proj", "blocks.1.q_proj"]
    for name, module in total.modules.items():
        each = [part.modules[name] for part in parts.values() if name in part.modules]
        assert sum(m.positions for m in each) == module.positions == 12
        assert sum(m.modified for m in each) == module.modified
        is_open = rec.positions[name][0].reshape(2, 6)
        if len(each) == 2:
            assert (each[0].samples, each[0].positions) == (1, 3)
            assert each[0].sparsity == pytest.approx(reference.sparsity([is_open[0, :3].tolist()]))
            samples = [is_open[0, 3:].tolist(), is_open[1].tolist()]
            assert each[1].sparsity == pytest.approx(reference.sparsity(samples))
            assert each[0].sparsity != each[1].sparsity
    positions = {g: sum(m.positions for m in r.modules.values()) for g, r in parts.items()}
    mean = sum(parts[g].token_sparsity * n for g, n in positions.items()) / sum(positions.values())
    assert mean == pytest.approx(total.token_sparsity)


def test_the_order_of_groups_changes_nothing():
    """Of flat positions, True has the samples of the report, and a tensor those that it says."""
    model, x = patched(tau=1.0), torch.randn(12, 8)
    first = torch.zeros(2, 6, dtype=torch.bool)
    first[0, :3] = True
    found = []
    for names in (["first", "all"], ["all", "first"]):
        with tokengate.record(
            model,
            groups=lambda name, shape, n=names: {g: first if g == "first" else True for g in n},
        ) as rec:
            model(x)
        found.append(rec.reports())
        assert found[-1]["all"].modules == rec.report().modules
        assert found[-1]["first"].modules["blocks.0.q_proj"].samples == 1
    assert {g: r.modules for g, r in found[0].items()} == {
        g: r.modules for g, r in found[1].items()
    }
    assert rec.report().modules["blocks.0.q_proj"].samples == 12


@pytest.mark.parametrize(
    "returned",
    [
        None,
        {"a": None},
        {"a": 1},
        {"a": torch.ones(3, 2, 5)},
        {"a": torch.ones(3, 2, 5).bool()},  # (B, T) is to say what the samples are
        {"a": torch.ones(30).bool()},
        {"a": torch.ones(3, 5).bool()},
        {"a": torch.ones(3, 10).int()},
    ],
)
def test_what_is_no_group_of_positions_is_said_before_it_is_counted(returned):
    model = patched(tau=1.0)
    words = ["groups returned", "'blocks.0.q_proj'", "(3, 2, 5)", "(B, T)"]
    recording = tokengate.record(model, positions=True, groups=lambda name, shape: returned)
    with recording as rec, one_sentence(*words):
        model(torch.randn(3, 2, 5, 8))
    assert not rec.positions
    with one_sentence("nothing was recorded"):
        rec.report()


def test_a_group_of_the_right_shape_is_counted():
    model = patched(tau=1.0)
    inside = torch.ones(3, 10).bool()
    with tokengate.record(model, groups=lambda name, shape: {"a": inside}) as rec:
        model(torch.randn(3, 2, 5, 8))
    assert rec.reports()["a"].modules == rec.report().modules


def test_without_groups_there_are_no_reports():
    model = patched()
    with tokengate.record(model) as rec:
        with pytest.raises(tokengate.TokenGateError, match="nothing was recorded"):
            rec.reports()
        model(torch.randn(2, 6, 8))
    assert rec.reports() == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_is_counted_once(reentrant):
    model = patched(tau=0.5)
    block, calls = model.blocks[0], []
    block.q_proj.register_forward_hook(lambda *_: calls.append(1))
    with tokengate.record(model) as rec:
        x = torch.randn(2, 6, 8, requires_grad=True)
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 2
    assert rec.report().modules["blocks.0.q_proj"].positions == 12


def test_recording_changes_no_number():
    model = patched(tau=0.5)
    x = torch.randn(2, 3, 8)
    plain = model(x)
    plain.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with tokengate.record(model, positions=True):
        recorded = model(x)
    recorded.sum().backward()
    assert torch.equal(plain, recorded)
    assert grads
    for name, grad in grads.items():
        assert torch.equal(model.get_parameter(name).grad, grad)


def test_an_empty_call_counts_nothing():
    model = patched()
    with tokengate.record(model) as rec:
        model(torch.randn(0, 5, 8))
        model(torch.randn(2, 5, 8))
    assert rec.report().modules["blocks.0.q_proj"].samples == 2


def module(sparsity, tau=0.1):
    if math.isnan(sparsity):
        return ModuleSparsity(sparsity, 0, 0, 0, tau)
    return ModuleSparsity(sparsity, 2, 100, round(100 * (1 - sparsity)), tau)


def example():
    return tokengate.SparsityReport(
        {
            "model.layers.0.self_attn.q_proj": module(0.5),
            "model.layers.0.self_attn.v_proj": module(0.1),
            "model.layers.1.self_attn.q_proj": module(0.9),
            "model.layers.1.self_attn.v_proj": module(math.nan, tau=None),
        }
    )


def test_table():
    table = example().table
    assert table.rows == ["0", "1"]
    assert table.columns == ["q_proj", "v_proj"]
    assert table.values == [[0.5, 0.1], [0.9, None]]
    assert table.row_averages == pytest.approx([0.3, 0.9])
    assert table.column_averages == pytest.approx([0.7, 0.1])
    assert example().sparsity == pytest.approx(0.5)
    assert example().std == pytest.approx(math.sqrt((0 + 0.16 + 0.16) / 3))


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        (["blocks.0.attn.proj", "blocks.0.mlp.proj"], ["0"], ["attn.proj", "mlp.proj"]),
        (["vision.layers.0.q", "text.layers.0.q"], ["vision.layers.0", "text.layers.0"], ["q"]),
        (["layers.0.q", "head"], ["0", "head"], ["q", "head"]),
        (["layers.0.experts.3.up"], ["0"], ["up"]),
        ([""], [""], [""]),
    ],
)
def test_names_become_rows_and_columns(names, rows, columns):
    table = tokengate.SparsityReport({name: module(0.5) for name in names}).table
    assert (table.rows, table.columns) == (rows, columns)


def test_text():
    assert str(example()).splitlines() == [
        "sparsity (%)",
        "layer  q_proj  v_proj   avg",
        "0        50.0    10.0  30.0",
        "1        90.0       -  90.0",
        "avg      70.0    10.0  50.0",
        "sparsity 50.0 % (std 32.7) over 3 modules; 50.0 % of all positions left unmodified; "
        "1 modules were never called",
    ]


def test_markdown():
    assert example().to_markdown().splitlines() == [
        "| layer | q_proj | v_proj | avg |",
        "| :-- | --: | --: | --: |",
        "| 0 | 50.0 | 10.0 | 30.0 |",
        "| 1 | 90.0 | - | 90.0 |",
        "| avg | 70.0 | 10.0 | 50.0 |",
    ]


def test_a_cell_without_a_module_is_not_that_of_the_layer_that_is_the_model():
    found = {"": module(0.5), "x.0.q": module(0.1), "x.1.v": module(0.9)}
    table = tokengate.SparsityReport(found).table
    assert table.columns == ["", "q", "v"]
    assert table.values == [[0.5, None, None], [None, 0.1, None], [None, None, 0.9]]


def test_markdown_of_a_name_with_a_bar():
    report = tokengate.SparsityReport({"layers.0.a|b": module(0.5)})
    assert report.to_markdown().splitlines()[0] == "| layer | a\\|b | avg |"


def test_csv_and_dict_hold_the_numbers():
    rows = list(csv.DictReader(io.StringIO(example().to_csv())))
    assert rows[0] == {
        "module": "model.layers.0.self_attn.q_proj",
        "sparsity": "0.5",
        "samples": "2",
        "positions": "100",
        "modified": "50",
        "tau": "0.1",
    }
    assert (rows[3]["sparsity"], rows[3]["tau"]) == ("", "")
    read = json.loads(json.dumps(example().to_dict(), allow_nan=False))
    assert read["sparsity"] == pytest.approx(0.5)
    assert read["modules"]["model.layers.1.self_attn.v_proj"]["sparsity"] is None


def test_unpatching_within_a_recording_leaves_nothing():
    model = Net()
    keys = sorted(model.blocks[0].q_proj.__dict__)
    tokengate.patch(model, ["q_proj"])
    with tokengate.record(model, positions=True) as rec, tokengate.disabled(model):
        tokengate.unpatch(model)
    assert sorted(model.blocks[0].q_proj.__dict__) == keys
    assert not rec.positions


def test_a_report_can_be_made_after_unpatching():
    model = patched(tau=0.25)
    with tokengate.record(model) as rec:
        model(torch.randn(2, 3, 8))
    tokengate.unpatch(model)
    assert {module.tau for module in rec.report().modules.values()} == {0.25}
