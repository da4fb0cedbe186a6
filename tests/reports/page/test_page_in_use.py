"""SparsityReport.to_html in a real Chromium: tabs, effects, pins, links, files, two reports."""

import csv
import io
import json
import math

import html_pages
import pytest
import torch
from html_pages import NEW, Q0, Q1, V0, cell, details, shares

import tokengate
from tokengate.reports.report import ModuleSparsity, SparsityReport

HOSTILE = "</script><img src=x onerror='hacked = 1'>"


def rich(**options):
    return html_pages.detailed().to_html(texts=[html_pages.effects()], **options)


def lines(page):
    return [line for line in details(page) if line]


def numbers(page, tab):
    """Of the cells of the first heatmap of a tab."""
    page.click(f"#tab-{tab}")
    return page.locator(f"#panel-{tab} td button").all_inner_texts()


def test_it_says_where_it_comes_from(opened):
    about = opened(rich()).locator(".about").inner_text()
    assert about.split() == [
        *("model", "Net", "method", "lora", "lambda", "1e-05"),
        *("date", "2026-11-28", "13:00", "UTC"),
    ]


def test_there_are_tabs_of_what_was_recorded_alone(opened):
    names = ["Sparsity", "tau", "r", "By position"]
    assert opened(rich()).locator("[role=tab]").all_inner_texts() == names
    assert opened(html_pages.whole()).locator("[role=tab]").all_inner_texts() == names[:2]


def test_the_heatmap_of_tau(opened):
    page = opened(rich())
    assert numbers(page, "sparsity") == ["50.0", "25.0", "75.0", "–"]
    assert not page.locator("#panel-tau").is_visible()
    assert numbers(page, "tau") == ["0.5", "–", "nan", "0.5"]
    assert not page.locator("#panel-sparsity").is_visible()
    page.locator("#panel-tau td button").first.click()
    assert cell(page, Q0).get_attribute("aria-pressed") == "true"
    assert shares(page) == [1, 1, 0, 0, None]


def test_r_is_drawn_with_tau_where_it_is(opened):
    page = opened(rich())
    page.click("#tab-r")
    chart = page.locator("#panel-r svg").first
    said = "r of 1 module, 1,200 positions: half of them below 0.595"
    assert chart.get_attribute("aria-label") == said  # the edge above the bin of 1/2
    bars = chart.locator(".bar").evaluate_all("a => a.map((e) => [e.x, e.y, e.height, e.width]"
                                              ".map((v) => v.baseVal.value))")  # fmt: skip
    heights = [height for *_, height, _ in bars]
    assert [h / max(heights) for h in heights] == pytest.approx([0.5, 1, 0.5])
    tau = float(chart.locator(".tau").get_attribute("x1"))
    assert tau == pytest.approx(bars[1][0])  # 1/2 is where its bin begins
    cell_of_v = page.locator("#panel-r svg").nth(1).locator("title").text_content()
    assert cell_of_v == f"{Q0}: tau 0.5, sparsity 50.0 %"


def test_the_course_over_the_sequence(opened):
    page = opened(rich())
    page.click("#tab-course")
    chart = page.locator("#panel-course svg")
    said = "modified positions, from 100.0 % at place 1 to 25.0 % at place 4"
    assert chart.get_attribute("aria-label") == said
    points = [
        [float(number) for number in each.split(" ")]
        for each in chart.locator("path").get_attribute("d").removeprefix("M").split("L")
    ]
    top, low = points[0][1], float(chart.locator(".axis").get_attribute("y1"))
    assert [(low - y) / (low - top) for _, y in points] == pytest.approx([1, 0.5, 0.25, 0.25], 0.01)
    # The scale is always that from 0 to 100 %.
    assert chart.locator("text").first.text_content() == "0 %"
    assert chart.get_by_text("100 %").count() == 1


def test_effect_stands_beside_openness(opened):
    page = opened(rich())
    page.hover(".token >> nth=2")
    assert lines(page)[:2] == ["“↵”", "token 3 of 5: modified by 0 of 3 modules, 0.0 %"]
    assert lines(page)[2:6] == [
        *("log-probability", "−1 nats, 0.368 times as likely"),
        *("KL from the base", "0.8 nats"),
    ]
    assert lines(page)[6:] == ["r on average", "about 0.25"]
    page.hover(".token >> nth=0")
    assert "none: nothing predicts it" in lines(page)
    classes = page.locator(".token").evaluate_all(
        "a => a.map((e) => [e.classList.contains('more'), e.classList.contains('less')])"
    )
    assert classes == [[False] * 2, [True, False], [False, True], [True, False], [False] * 2]
    # Openness 1/3, 0, 1/3 beside a KL of 0.2, 0.8, 0.1: ranks 1.5, 0, 1.5 and 1, 2, 0.
    summary = page.locator("#views p").inner_text()
    assert summary.endswith("rank correlation of that with KL −0.866")
    page.select_option("#shade", "kl")
    assert shares(page) == [0, 0.25, 1, 0.125, None]
    page.select_option("#shade", "log_prob")
    assert shares(page) == [0, 0.5, 1, 0.25, None]
    assert page.locator(".token.falls").all_inner_texts() == ["↵"]


def test_words_in_place_of_sub_words(opened):
    page = opened(rich())
    assert page.locator(".token").count() == 5
    page.check("#words")
    assert page.locator(".token").all_inner_texts() == ["thecat", "↵", "␣␣", "<pad>"]
    assert shares(page) == [pytest.approx((1 + 1 / 3) / 2), 0, 1 / 3, None]
    page.hover(".token >> nth=0")
    assert lines(page)[1] == "tokens 1 to 2 of 5: modified by 3 of 3 modules, 66.7 %"
    assert lines(page)[3] == "+0.5 nats, 1.65 times as likely"
    page.uncheck("#words")
    assert page.locator(".token").count() == 5


def test_there_is_no_choice_of_words_where_tokens_are_words(opened):
    assert not opened(html_pages.whole()).locator("#words").is_visible()


def test_shades_relative_to_the_largest_share(opened):
    is_open = {Q0: torch.tensor([1, 0]).bool(), V0: torch.tensor([0, 0]).bool()}
    view = tokengate.TokenView(["a", "b"], is_open)
    page = opened(html_pages.report().to_html(texts=[view]))
    assert shares(page) == [0.5, 0]
    page.check("#relative")
    assert shares(page) == [1, 0]
    assert "50.0 % of the modules, the largest share" in page.inner_text("#share-legend")
    page.locator('#panel-sparsity td button[aria-label^="layers.0.v_proj:"]').click()
    assert shares(page) == [0, 0]


def test_the_most_and_the_least_modified_tokens(opened):
    first = html_pages.text(tokens=["a", "b", "a", "c", "a"])
    second = html_pages.text(tokens=["c", "c", "b", "d", "b"])
    page = opened(html_pages.report().to_html(texts=[first, second]))
    cell(page, Q0).click()  # S of both is 1 1 0 0, and padding
    rows = page.locator(".ranking").first.locator("tbody tr").all_inner_texts()
    found = [row.split("\t") for row in rows]
    # c: 0 of 1 and 2 of 2; a: 1 of 2; b: 1 of 1 and 0 of 1; d: 0 of 1.
    assert found[0] == ["c", "3", "66.7 %"]
    assert sorted(found[1:3]) == [["a", "2", "50.0 %"], ["b", "2", "50.0 %"]]
    assert found[3] == ["d", "1", "0.0 %"]
    least = page.locator(".ranking").nth(1).locator("tbody tr").first.inner_text()
    assert least.split("\t") == ["d", "1", "0.0 %"]


def test_a_click_pins_and_escape_lets_go(opened):
    page = opened(rich())
    page.click(".token >> nth=1")
    assert page.locator('.token[aria-pressed="true"]').all_inner_texts() == [" cat"]
    cell(page, Q0).hover()
    assert details(page)[0] == "“ cat”"
    cell(page, Q0).click()
    assert lines(page)[1] == "token 2 of 5: modified by 1 of 1 module, 100.0 %"
    page.keyboard.press("Escape")
    assert page.locator('.token[aria-pressed="true"]').count() == 0
    assert page.locator("#chosen").inner_text() == f"1 of 4 modules chosen: {Q0}"
    page.keyboard.press("Escape")
    assert page.locator("#chosen").inner_text() == "All 4 modules"
    page.click(".token >> nth=1")
    page.click(".token >> nth=1")
    assert page.locator('.token[aria-pressed="true"]').count() == 0


def test_the_address_has_the_choice(opened):
    page = opened(rich())
    assert "#" not in page.url
    cell(page, Q0).click()
    page.click("#tab-tau")
    page.click(".token >> nth=2")
    page.check("#words")
    page.check("#relative")
    page.select_option("#shade", "kl")
    fragment = page.url.split("#")[1]
    assert fragment == "tab=tau&modules=0&at=0.2&shade=kl&words&relative"
    page = opened(rich(), fragment=f"#{fragment}")
    assert page.locator('[role="tab"][aria-selected="true"]').inner_text() == "tau"
    assert page.locator("#chosen").inner_text() == f"1 of 4 modules chosen: {Q0}"
    assert page.locator('.token[aria-pressed="true"]').all_inner_texts() == ["↵"]
    assert page.is_checked("#words")
    assert page.is_checked("#relative")
    assert page.input_value("#shade") == "kl"
    page.evaluate("location.hash = 'modules=1'")
    page.wait_for_selector(f"#chosen:text-is('1 of 4 modules chosen: {V0}')")


@pytest.mark.parametrize(
    "fragment", ["#modules=99.-1.x&at=7.0&tab=<img>&shade=toString", "#at=0.99", "#%", "#at=0"]
)
def test_an_address_that_says_nothing_is_nothing(opened, fragment):
    page = opened(rich(), fragment=fragment)
    assert page.locator("#chosen").inner_text() == "All 4 modules"
    assert page.locator('[aria-pressed="true"]').count() == 0
    assert page.locator('[role="tab"][aria-selected="true"]').inner_text() == "Sparsity"
    assert page.locator(".token").count() == 5


def saved(page, what):
    with page.expect_download() as found:
        page.click(f'[data-file="{what}"]')
    assert found.value.suggested_filename == f"Where-the-modifications-act-{what}"
    with open(found.value.path(), encoding="utf-8", newline="") as file:
        return file.read()


def test_files_of_what_is_on_the_page(opened):
    page = opened(rich(), accept_downloads=True)
    rows = list(csv.DictReader(io.StringIO(saved(page, "modules.csv"))))
    assert [row["module"] for row in rows] == list(html_pages.report().modules)
    assert [row["sparsity"] for row in rows] == ["0.5", "0.25", "0.75", ""]
    rows = list(csv.DictReader(io.StringIO(saved(page, "tokens.csv"))))
    assert [json.loads(row["token"]) for row in rows] == html_pages.TOKENS
    assert [row["modified_by"] for row in rows] == ["3", "1", "0", "1", ""]
    assert [row["log_prob_change"] for row in rows] == ["", "0.5", "-1", "0.25", ""]
    found = json.loads(saved(page, "report.json"))
    assert found["reports"][0]["about"] == html_pages.ABOUT
    assert found["reports"][0]["modules"][Q0]["sparsity"] == 0.5
    assert found["texts"][0]["modified"] == {Q0: [0, 1, 4], V0: [0, 3, 4], Q1: [0, 4]}
    assert found["texts"][0]["kl"] == [None, 0.2, 0.8, 0.1, None]


def test_every_tau_is_in_the_file_as_it_is(opened):
    taus = [0.25, -0.5, math.inf, -math.inf, math.nan]
    report = SparsityReport(
        {f"x.{i}.q": ModuleSparsity(0.5, 1, 2, 1, t) for i, t in enumerate(taus)}
    )
    page = opened(report.to_html(), accept_downloads=True)
    rows = list(csv.DictReader(io.StringIO(saved(page, "modules.csv"))))
    assert [str(float(row["tau"])) for row in rows] == list(map(str, taus))


def test_a_spreadsheet_computes_nothing_of_them(opened):
    name = "=1+1,x.0.@q"
    view = tokengate.TokenView(["=2+3", "@a"], {name: torch.ones(2).bool()})
    report = SparsityReport({name: ModuleSparsity(0.5, 1, 2, 1, 0.0)})
    page = opened(report.to_html(texts=[view]), accept_downloads=True)
    for what in ("modules.csv", "tokens.csv"):
        cells = [each for row in csv.reader(io.StringIO(saved(page, what))) for each in row]
        assert any("=" in each for each in cells)
        assert not [each for each in cells if each.lstrip().startswith(("=", "@", "+"))]


def test_two_reports_side_by_side(opened):
    html = html_pages.report().to_html(beside=html_pages.other(), names=("before", "after"))
    page = opened(html, viewport={"width": 1280, "height": 900})
    assert page.locator(".about").all_inner_texts()[1].startswith("after")
    tables = page.locator("#panel-sparsity table")
    assert tables.locator("caption").all_inner_texts() == ["before", "after"]
    boxes = [tables.nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert tables.nth(1).locator("td button").all_inner_texts() == [
        "75.0",
        "–",
        "25.0",
        "–",
        "100.0",
    ]
    both = cell(page, Q0)
    assert both.count() == 2
    both.first.hover()
    assert lines(page)[:6] == [
        *(Q0, "before | after", "sparsity", "50.0 % | 75.0 %", "change", "+25 points"),
    ]
    both.nth(1).click()
    assert [both.nth(i).get_attribute("aria-pressed") for i in (0, 1)] == ["true", "true"]
    assert cell(page, NEW).first.get_attribute("aria-label") == f"{NEW}: not in this report"


def test_text_of_a_second_report_is_shown_and_never_run(opened):
    hostile = SparsityReport({HOSTILE: ModuleSparsity(0.5, 1, 2, 1, 0.0)}, {HOSTILE: HOSTILE})
    view = tokengate.TokenView([f"x{HOSTILE}", "##b"], {HOSTILE: torch.ones(2).bool()})
    html = hostile.to_html(texts=[view], beside=hostile, names=(HOSTILE, HOSTILE))
    page = opened(html, fragment="#words&at=0.0")
    assert page.locator("caption").all_text_contents()[:2] == [HOSTILE] * 2
    assert page.locator(".about b").first.text_content() == HOSTILE
    assert page.locator(".ranking tbody th").first.text_content() == f"x{HOSTILE}b"
    for tab in ("tau", "sparsity"):
        page.click(f"#tab-{tab}")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img").count() == 0


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def test_on_a_phone_the_table_scrolls_and_stays_in_sight(opened):
    report, view = html_pages.large(tokens=400)
    page = opened(report.to_html(texts=[view]), **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    panel = page.locator("#panel-sparsity")
    inner = "(e) => [e.scrollWidth > e.clientWidth, e.scrollHeight > e.clientHeight]"
    assert panel.evaluate(inner) == [True, True]
    page.locator(".token").nth(200).tap()
    table, aside = panel.bounding_box(), page.locator("aside").bounding_box()
    token = page.locator(".token").nth(200).bounding_box()
    assert table["y"] >= 0
    assert table["y"] + table["height"] <= token["y"]
    assert token["y"] + token["height"] <= aside["y"]
    assert details(page)[0] == "“ token200”"
    # Headings and names of layers stay, wherever the table is scrolled to.
    panel.evaluate("(e) => { e.scrollTop = 300; e.scrollLeft = 200; }")
    head = page.locator("#heatmap thead th").first.bounding_box()
    assert head["x"] == pytest.approx(table["x"], abs=3)
    assert head["y"] == pytest.approx(table["y"], abs=3)


def test_what_it_says_of_keys_and_fingers_is_the_devices(opened):
    page = opened(rich())
    assert "arrow keys" in page.inner_text("#details")
    page = opened(rich(), **PHONE)
    assert page.inner_text("#details").startswith("Tap a module")
    assert "keys" not in page.inner_text("#details")


def test_tokens_and_patches_are_buttons_large_enough_for_a_finger(opened):
    grid = {Q0: torch.rand(20, 20) < 0.5}
    html = html_pages.report().to_html(
        texts=[html_pages.text(tokens=["a", ".", "\n", "", "x"])],
        images=[html_pages.image(is_open=grid)],
    )
    page = opened(html, **PHONE)
    for kind, many in ((".token", 5), (".patch", 400), ("#heatmap button", 8)):
        buttons = page.locator(kind)
        assert buttons.count() == many
        sizes = buttons.evaluate_all(
            "a => a.map((e) => [e.tagName, e.offsetWidth, e.offsetHeight, e.ariaLabel])"
        )
        for tag, width, height, label in sizes:
            assert tag == "BUTTON"
            assert min(width, height) >= 24
            assert label
    assert page.locator(".token").first.get_attribute("aria-label") == (
        "a, token 1 of 5: modified by 100.0 % of 3 modules"
    )


def test_a_text_of_more_tokens_than_a_call_has_arguments(opened):
    """The page was blank."""
    count, draw = 130_000, torch.Generator().manual_seed(0)
    view = tokengate.TokenView(
        [f"t{i % 50}" for i in range(count)],
        {Q0: torch.rand(count, generator=draw) < 0.5},
        log_prob=torch.randn(count, generator=draw),
        kl=torch.rand(count, generator=draw),
    )
    module = ModuleSparsity(sparsity=0.5, samples=1, positions=count, modified=65_000, tau=None)
    page = opened(SparsityReport({Q0: module}).to_html(texts=[view]))
    assert page.locator("#views p").first.inner_text().startswith("130,000 tokens; ")
