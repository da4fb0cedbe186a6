"""The pictures, by what was drawn: data, labels and cells that are not there."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence
from torch import nn

import tokengate
from tokengate.reports.histogram import RATIO_EDGES
from tokengate.reports.report import ModuleSparsity, SparsityReport

matplotlib = pytest.importorskip("matplotlib", reason="the viz extra is not installed")

from matplotlib.colors import to_rgba  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from tokengate.integrations import plots  # noqa: E402


def report(cells):
    modules = {name: ModuleSparsity(s, 2, 8, 4, 0.1) for name, s in cells.items()}
    return SparsityReport(modules)


SMALL = report({"m.0.q": 0.25, "m.0.v": 0.0, "m.1.q": math.nan, "m.2.v": 1.0})


def texts(ax):
    """The cells' labels, by column and row."""
    return {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts}


def drawn(figure):
    figure.canvas.draw()
    return figure


def test_a_heatmap_has_the_tables_values_and_labels():
    ax = drawn(plots.heatmap(SMALL)).axes[0]
    values = ax.images[0].get_array()
    assert values.tolist() == [[25, 0], [None, None], [None, 100]]
    assert texts(ax) == {
        (0, 0): "25", (1, 0): "0", (0, 1): "-", (1, 1): "-", (0, 2): "-", (1, 2): "100",
    }  # fmt: skip
    assert [t.get_text() for t in ax.get_xticklabels()] == ["q", "v"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2"]
    assert "41.7 % overall" in ax.get_title()


def test_a_cell_without_a_value_does_not_look_like_a_sparsity_of_0():
    image = drawn(plots.heatmap(SMALL)).axes[0].images[0]
    colours = image.cmap(image.norm(image.get_array()))
    missing, zero = tuple(colours[1, 0]), tuple(colours[0, 1])
    assert missing == to_rgba(plots.NOTHING)
    assert zero == image.cmap(0)
    assert missing != zero
    # Nor like any other.
    nearest = min(
        sum(abs(a - b) for a, b in zip(image.cmap(i), missing, strict=True)) for i in range(256)
    )
    assert nearest > 0.2


def test_a_table_of_llama_s_size_can_be_read():
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    cells = {f"model.layers.{i}.x.{n}": (i + 1) / 32 for i in range(32) for n in names}
    figure = drawn(plots.heatmap(report(cells)))
    ax = figure.axes[0]

    def overlapping(artists):
        boxes = [artist.get_window_extent() for artist in artists]
        return [1 for a, b in itertools.pairwise(boxes) if a.overlaps(b)]

    assert len(ax.texts) == 32 * 7
    for artists in (ax.texts, ax.get_xticklabels(), ax.get_yticklabels()):
        assert not overlapping(artists)
        assert min(artist.get_fontsize() for artist in artists) >= 8
    assert overlapping([ax.texts[0], ax.texts[0]])


def test_text_stands_out_from_its_cell():
    """By the contrast ratio that WCAG asks of large text, 3 to 1."""

    def light(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    cells = {f"m.{i}.q": i / 100 for i in range(101)} | {"m.101.q": math.nan}
    ax = drawn(plots.heatmap(report(cells))).axes[0]
    image = ax.images[0]
    colours = image.cmap(image.norm(image.get_array()))
    for text in ax.texts:
        x, y = map(int, text.get_position())
        dark, bright = sorted([light(colours[y, x]), light(to_rgba(text.get_color()))])
        assert (bright + 0.05) / (dark + 0.05) > 3, text


def test_a_table_alone_and_an_ax_of_the_user_s():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plots.heatmap(SMALL.table, ax=right) is figure
    assert not left.images
    assert right.images[0].get_array().tolist() == [[25, 0], [None, None], [None, 100]]
    assert "overall" not in right.get_title()


def test_report_plot_writes_a_file_of_the_kind_that_its_name_says(tmp_path, monkeypatch):
    figure = SMALL.plot(tmp_path / "sparsity.png")
    assert texts(figure.axes[0])[0, 0] == "25"
    assert (tmp_path / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    SMALL.plot(str(tmp_path / "sparsity.svg"))
    assert "<svg" in (tmp_path / "sparsity.svg").read_text()
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.chdir(tmp_path)  # a long path would be shortened
    for name in ("sparsity", "sparsity.xyz"):  # matplotlib writes sparsity.png for the first
        with one_sentence(name, ".png, .pdf, .svg"):
            SMALL.plot(name)
    assert len(list(tmp_path.iterdir())) == 2
    SMALL.plot(tmp_path / "made" / "SPARSITY.PNG")
    assert (tmp_path / "made" / "SPARSITY.PNG").stat().st_size > 1000


def test_without_matplotlib_plot_says_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = None
import tokengate
report = tokengate.SparsityReport({})
try:
    report.plot()
except tokengate.TokenGateError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == (
        "a picture was asked for without matplotlib: install it, pip install 'tokengate[viz]'."
    )


def test_pyplot_which_chooses_a_backend_is_never_imported(tmp_path):
    code = f"""
import sys
import tokengate
from tokengate.reports.module_sparsity import ModuleSparsity
report = tokengate.SparsityReport({{"m.0.q": ModuleSparsity(0.5, 1, 2, 1, 0.1)}})
figure = report.plot({str(tmp_path / "a.png")!r})
assert figure._repr_png_().startswith(b"\\x89PNG")
print("matplotlib.pyplot" in sys.modules)
import matplotlib.pyplot
print("matplotlib.pyplot" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]


def history(sparse=True, loss=True, offset=0.0):
    model = tokengate.patch(Net(), ["q_proj", "v_proj"])
    made = tokengate.History(model)
    for step in (0, 10, 20):
        for i, layer in enumerate(tokengate.layers(model).values()):
            layer.gate.tau.data.fill_(i + step + offset)
        shares = dict(zip(tokengate.layers(model), (0.0, 0.5, 1.0, math.nan), strict=True))
        own = report(shares) if sparse else None
        made.log(step, loss=3.0 - step / 10 if loss else None, report=own)
    return made


def lines(ax):
    return [line.get_ydata().tolist() for line in ax.lines]


def test_trajectories_are_the_history_s():
    figure = drawn(plots.trajectories(history()))
    loss, tau, sparsity = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "tau", "sparsity (%)"]
    assert lines(loss) == [[3, 2, 1]]
    # Both layers' q_proj, then both layers' v_proj.
    assert lines(tau) == [[0, 10, 20], [2, 12, 22], [1, 11, 21], [3, 13, 23]]
    assert lines(sparsity) == [[50] * 3, [50] * 3, [50] * 3]
    assert all(line.get_xdata().tolist() == [0, 10, 20] for line in tau.lines)
    colours = [line.get_color() for line in tau.lines]
    assert colours[0] == colours[1] == sparsity.lines[0].get_color() != colours[2] == colours[3]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["q_proj", "v_proj", "mean of all"]
    (labelled,) = [line for line in sparsity.lines if line.get_label() == "mean of all"]
    assert labelled.get_linewidth() > max(x.get_linewidth() for x in sparsity.lines[:-1])
    # The scale of shares is always the same.
    assert sparsity.get_ylim() == (-3, 103)
    assert figure.get_suptitle()
    assert sparsity.get_xlabel() == "step"


def test_the_legend_has_every_projection_of_every_column():
    both = {}
    for name in ("q_proj", "v_proj"):
        both[name] = tokengate.History(tokengate.patch(Net(), [name], rank=2))
        both[name].log(1)
    (legend,) = drawn(plots.trajectories(both)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["q_proj", "v_proj"]
    colours = [line.get_color() for line in legend.get_lines()]
    assert colours[0] != colours[1]


def test_trajectories_side_by_side():
    both = {"with Adam": history(), "without": history(loss=False, offset=100)}
    figure = drawn(plots.trajectories(both, modules=["blocks.1.q_proj"]))
    assert len(figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes[:2]] == ["with Adam", "without"]
    assert lines(figure.axes[1]) == [[]] or all(map(math.isnan, lines(figure.axes[1])[0]))
    assert lines(figure.axes[2]) == [[2, 12, 22]]
    assert lines(figure.axes[3]) == [[102, 112, 122]]
    assert figure.axes[2].get_ylim() == figure.axes[3].get_ylim()
    assert lines(figure.axes[4])[-1] == [100] * 3


@pytest.mark.parametrize("titles", [["one"], ["one", "two", "three"]])
def test_nothing_of_the_trajectories_lies_on_another(titles):
    figure = plots.trajectories({title: history() for title in titles})
    plots.pixels(figure)  # which lays it out
    parts = [figure._suptitle, *figure.legends, *figure.axes]
    boxes = [part.get_window_extent() for part in parts]
    assert boxes[0].overlaps(boxes[0])
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_trajectories_leave_out_what_was_not_logged():
    figure = plots.trajectories(history(sparse=False, loss=False))
    assert [ax.get_ylabel() for ax in figure.axes] == ["tau"]
    model = tokengate.patch(Net(), ["q_proj"])
    assert len(drawn(plots.trajectories(tokengate.History(model))).axes) == 1


def with_ratios(places, tau):
    """A module with so many positions in the bins of r that begin at these edges."""
    counts = [0] * (len(RATIO_EDGES) + 1)
    for edge, count in places.items():
        counts[RATIO_EDGES.index(edge) + 1] = count
    return ModuleSparsity(0.5, 1, 10, 5, tau, ratios=tuple(counts))


def test_ratios_have_tau_where_it_is():
    outside = ModuleSparsity(0.5, 1, 10, 5, None, ratios=(3, *[0] * 160, 4))
    modules = {
        "m.0.q": with_ratios({0.5: 1, 2**-0.75: 4}, 0.2),
        "m.1.q": with_ratios({1.0: 2, 2**0.25: 1}, -0.1),
        "m.1.v": outside,
        "m.1.k": ModuleSparsity(0.0, 1, 10, 10, None),  # without a gate
    }
    figure = drawn(plots.ratios(SparsityReport(modules)))
    q, v = figure.axes
    assert [ax.get_title() for ax in (q, v)] == ["q", "v"]
    assert [t.get_text() for t in q.get_yticklabels()] == ["0", "1"]
    first, second = q.collections
    assert first.get_array().tolist() == [[0.25, 1]]
    assert second.get_array().tolist() == [[1, 0.5]]
    corners = first.get_coordinates()
    assert corners[0, :, 0].tolist() == [0.5, 2**-0.75, 2**-0.5]
    assert corners[:, 0, 1].tolist() == [-0.4, 0.4]
    assert lines(q) == [[-0.5, 0.5]]
    assert q.lines[0].get_xdata().tolist() == [0.2, 0.2]
    assert not v.collections
    assert not v.lines
    assert q.get_xscale() == "log"


def test_the_share_left_of_tau_is_the_sparsity():
    """Of r as a gate itself decides on it, with a tau that is an edge of two bins."""
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"], tau=1.0))
    with tokengate.record(model, ratios=True) as rec, torch.no_grad():
        model(torch.randn(4, 50, 8))
    (ax,) = drawn(plots.ratios(rec.report())).axes
    for mesh, line, sparsity in zip(
        ax.collections, ax.lines, rec.report().by_module.values(), strict=True
    ):
        # The shares are of the fullest bin.
        shares = mesh.get_array()[0]
        left = shares[mesh.get_coordinates()[0, 1:, 0] <= line.get_xdata()[0]].sum() / shares.sum()
        assert left == pytest.approx(sparsity)
        assert 0.05 < sparsity < 0.95


def test_a_layer_that_is_the_model_is_drawn():
    layer = nn.Linear(4, 4)
    tokengate.patch(layer, "all-linear", rank=1, tau=0.5)
    kept = tokengate.History(layer)
    kept.log(0)
    (ax,) = drawn(plots.trajectories(kept)).axes
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.5]]


def test_more_projections_than_styles_are_all_drawn():
    """A sequence of layers has a projection for each of them."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    tokengate.patch(model, "all-linear", rank=1)
    kept = tokengate.History(model)
    kept.log(0)
    assert len(drawn(plots.trajectories(kept)).axes[0].lines) == 30
    curves = {f"way {i}": {0.5: [1.0]} for i in range(30)}
    assert len(drawn(plots.performance(curves)).axes[0].containers) == 30


def test_performance_has_means_and_deviations():
    curves = {"S_low": {0.5: [80.0, 84.0], 0.25: [70.0]}, "random": {0.5: [60.0, 60.0]}}
    figure = drawn(plots.performance(curves, score="accuracy (%)"))
    (ax,) = figure.axes
    low, random = ax.containers
    # Side by side, a percent apart.
    assert low.lines[0].get_xydata().tolist() == [[24.5, 70], [49.5, 82]]
    bars = [segment[:, 1].tolist() for segment in low.lines[2][0].get_segments()]
    deviation = 8**0.5  # of a sample
    assert bars == [[70, 70], pytest.approx([82 - deviation, 82 + deviation])]
    assert random.lines[0].get_xydata().tolist() == [[50.5, 60]]
    assert ax.get_title() == "accuracy (%) by the share of modules that are adapted"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["S_low", "random"]
    assert ax.get_ylabel() == "accuracy (%)"
    assert low.lines[0].get_color() != random.lines[0].get_color()
    assert low.lines[0].get_marker() != random.lines[0].get_marker()
    other = Figure().subplots()
    assert plots.performance(curves, ax=other) is other.figure
    assert len(other.containers) == 2


def test_refusals():
    with one_sentence("heatmap", "dict", "SparsityReport"):
        plots.heatmap({})
    with one_sentence("without a module"):
        SparsityReport({}).plot()
    for none in ({}, None, [history()]):
        with one_sentence("no history", "by title"):
            plots.trajectories(none)
    with one_sentence("'q_proj'", "blocks.0.q_proj"):
        plots.trajectories(history(), modules=["q_proj"])
    with one_sentence("ratios was given {}", "rec.report()"):
        plots.ratios({})
    with one_sentence("ratios was asked of any module", "ratios=True"):
        plots.ratios(SMALL)
    with one_sentence("'S_low'", "50"):
        plots.performance({"S_low": {50: [1.0]}})
    with one_sentence("'S_low'", "0 scores"):
        plots.performance({"S_low": {0.5: []}})
