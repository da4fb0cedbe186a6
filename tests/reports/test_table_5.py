"""The paper's Table 5: its printed numbers in, its averages and standard deviations out.

Module-wise sparsity of LLaMA3-8B on commonsense reasoning in percent, arXiv 2511.16147. Each cell
is rounded to 0.1, so that averages of them may be off by as much as the cells.
"""

import math
import statistics

import pytest

import tokengate
from tokengate.reports.module_sparsity import ModuleSparsity

# Per layer: q, k, v, avg of LoRA_S, of DoRA_S and of AdaLoRA_S; "-" where the rank is 0.
PRINTED = """
     65.6  77.6   0.0  47.7 100.0   0.0   0.0  33.3     -     -  76.9  76.9
     59.7  65.5  54.8  60.0 100.0   0.0  65.0  55.0  62.3  84.5  68.4  71.8
     62.8  64.9  51.5  59.7 100.0 100.0  57.2  85.7  57.3  75.0  81.7  71.3
     60.1  64.4  56.3  60.2  99.8 100.0  37.1  79.0  67.6  68.7  81.9  72.7
     63.7  67.6  56.6  62.6  24.6   0.0  83.0  35.9  48.2  70.2  75.8  64.7
     57.9  62.6  54.8  58.4   0.0   0.0  30.9  10.3  49.6  86.4  80.9  72.3
     62.4  60.6  48.4  57.1 100.0   0.0  62.9  54.3  70.7  84.8  66.1  73.9
     61.3  65.9  51.2  59.5   0.0   0.0  82.8  27.6  59.8  86.6  77.2  74.5
     60.8  65.8  50.4  59.0  70.5  57.1  60.2  62.6  54.0  93.6  60.7  69.4
     65.9  51.1  53.1  56.7   0.0  11.6  47.4  19.7  52.0  72.4  61.2  61.9
     57.7  58.7  52.8  56.4   0.0   0.0  41.3  13.8  51.3  82.5  64.2  66.0
     58.5  57.5  42.3  52.8  91.7  77.2  76.1  81.7  54.2  86.6  65.0  68.6
     51.9  68.2  49.9  56.7   0.0   0.0   2.1   0.7  50.7  87.9  56.0  64.9
     58.9  68.3  51.2  59.5  90.2  90.0  35.1  71.7  61.3  73.4  56.1  63.6
     57.1  60.6  48.9  55.6   0.0  82.6  44.6  42.4  62.0  68.6  44.8  58.5
     63.2  63.5  51.0  59.3  81.2   0.0  35.2  38.8  66.3  69.0  46.0  60.4
     58.5  69.9  55.9  61.4  99.8 100.0   3.6  67.8  59.2  86.9  48.8  65.0
     62.9  70.8  54.7  62.8  99.3 100.0  30.9  76.7  61.6  74.0  53.6  63.1
     67.3  75.9  61.3  68.2  99.5  70.0  47.0  72.2  62.6  94.7  62.5  73.3
     65.6  64.4  54.0  61.3  98.0   0.0  78.5  58.8  66.9  80.5  62.7  70.0
     67.8  66.0  47.5  60.4  97.6   0.0   0.8  32.8  65.5  85.8  54.7  68.6
     58.2  63.5  44.2  55.3  99.4 100.0  42.4  80.6  61.0  69.1  45.4  58.5
     62.8  57.6  58.2  59.5  99.8  98.0  79.5  92.4  64.5  70.8  59.7  65.0
     70.0  71.7  55.6  65.8  99.5   2.5  14.0  38.7  69.6  71.9  57.7  66.4
     72.3  63.0  53.5  62.9   0.0   0.3  46.0  15.4  68.8  73.7  67.2  69.9
     69.8  63.2  56.3  63.1   0.2   0.0   4.7   1.6  58.6  65.8  76.9  67.1
     65.1  70.2  56.4  63.9   9.4  94.2  56.5  53.4  64.4  74.5  67.7  68.8
     68.9  67.2  68.2  68.1  99.8  95.1  45.1  80.0  62.7  85.8  78.3  75.6
     57.8  58.9  61.5  59.4  17.9  99.9  94.9  70.9  63.8  76.2  86.1  75.4
     71.6  78.7  49.3  66.5   0.0 100.0  11.4  37.1  63.9  74.4  79.7  72.7
     59.5  59.6  57.2  58.8   0.0 100.0  39.2  46.4  67.8  68.6  72.9  69.8
     64.4  67.3  46.1  59.3 100.0   0.0   1.2  33.7  69.3  71.0  57.7  66.0
"""
COLUMNS = {"LoRA": (64.8, 67.4, 53.3), "DoRA": (60.6, 47.7, 43.8), "AdaLoRA": (61.2, 77.9, 67.6)}
STDS = {"LoRA": 9.8, "DoRA": 41.3, "AdaLoRA": 11.4}
METHODS = list(COLUMNS)


def printed(method):
    """Its cells, and its row averages: (32, 3), (32,)."""
    start = 4 * METHODS.index(method)
    rows = [line.split()[start : start + 4] for line in PRINTED.strip().splitlines()]
    numbers = [[None if cell == "-" else float(cell) for cell in row] for row in rows]
    return [row[:3] for row in numbers], [row[3] for row in numbers]


def report_of(cells):
    """As if 1000 positions of one sample had been recorded; a module of rank 0 is not there."""
    return tokengate.SparsityReport(
        {
            f"model.layers.{layer}.self_attn.{name}_proj": ModuleSparsity(
                cell / 100, 1, 1000, round(1000 - 10 * cell), 0.1
            )
            for layer, row in enumerate(cells)
            for name, cell in zip("qkv", row, strict=True)
            if cell is not None
        }
    )


@pytest.mark.parametrize("method", METHODS)
def test_rows_average_as_printed(method):
    cells, averages = printed(method)
    table = report_of(cells).table
    assert sorted(table.columns) == ["k_proj", "q_proj", "v_proj"]
    assert len(table.rows) == len(averages) == 32
    found = [100 * average for average in table.row_averages]
    # Of rounded cells, rounded again.
    assert found == pytest.approx(averages, abs=0.05 + 0.05 + 1e-9)
    same = sum(f"{a:.1f}" == f"{b:.1f}" for a, b in zip(found, averages, strict=True))
    assert same >= 29


@pytest.mark.parametrize("method", METHODS)
def test_columns_average_as_printed(method):
    """The printed averages are sums divided by 31, although the table has 32 layers.

    In two columns of AdaLoRA the rank of one layer is 0, and 31 is right. Of all others, the
    printed average is 32/31 of what is the average.
    """
    cells, _ = printed(method)
    table = report_of(cells).table
    for name, wanted in zip("qkv", COLUMNS[method], strict=True):
        column = table.columns.index(f"{name}_proj")
        layers = sum(row[column] is not None for row in table.values)
        average = 100 * table.column_averages[column]
        assert round(average * layers / 31, 1) == wanted
        assert (round(average, 1) == wanted) == (layers == 31)


@pytest.mark.parametrize("method", METHODS)
def test_standard_deviations_are_those_of_section_5(method):
    """9.8, 11.4 and 41.3 are deviations from the averages that are printed.

    Around the average of the three printed column averages, which are sums divided by 31, the
    printed cells deviate by 9.77, 11.41 and 41.36. The last is 41.3 once the cells printed as 0.0
    and 100.0 are the 0.04 and 99.96 that they may be. `std` is around the average itself: 9.6,
    11.4 and 41.3, of which the first alone is another number.
    """
    cells, _ = printed(method)
    report = report_of(cells)
    assert f"{100 * report.std:.1f}" == {"LoRA": "9.6", "DoRA": "41.3", "AdaLoRA": "11.4"}[method]
    columns = zip(*cells, strict=True)
    centre = statistics.fmean(sum(filter(None, column)) / 31 for column in columns)

    def deviation(ends=0.0):
        values = [min(max(100 * s, ends), 100 - ends) for s in report.by_module.values()]
        return math.sqrt(statistics.fmean((each - centre) ** 2 for each in values))

    assert abs(centre - 100 * report.sparsity) > 0.5
    assert deviation() == pytest.approx(
        {"LoRA": 9.767, "DoRA": 41.358, "AdaLoRA": 11.412}[method], abs=1e-3
    )
    assert round(deviation(ends=0.04), 1) == STDS[method]


def test_rows_and_columns_have_standard_deviations():
    cells, _ = printed("AdaLoRA")
    table = report_of(cells).table
    assert 100 * table.row_stds[0] == pytest.approx(0)  # of v alone
    assert 100 * table.row_stds[1] == pytest.approx(statistics.pstdev([62.3, 84.5, 68.4]))
    found = dict(zip(table.columns, table.column_stds, strict=True))
    for name, column in zip("qkv", zip(*cells, strict=True), strict=True):
        wanted = statistics.pstdev(cell for cell in column if cell is not None)
        assert 100 * found[f"{name}_proj"] == pytest.approx(wanted)


def test_the_printed_table_is_what_a_report_prints():
    cells, _ = printed("AdaLoRA")
    lines = str(report_of(cells)).splitlines()
    assert lines[1].split() == ["layer", "v_proj", "q_proj", "k_proj", "avg"]
    assert lines[2].split() == ["0", "76.9", "-", "-", "76.9"]
    assert lines[34].split() == ["avg", "65.5", "61.2", "77.9", "68.1"]
