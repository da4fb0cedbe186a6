"""SparsityReport.to_html in a real Chromium: what is seen, and what it does when it is used."""

import html_pages
import pytest
import torch
from html_pages import Q0, V0, cell, details, shares, whole
from test_html_report import luminance

import tokengate
from tokengate.reports.report import ModuleSparsity, SparsityReport


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_and_shows_everything(opened, scheme):
    page = opened(whole(), scheme)
    assert page.locator("dd").all_inner_texts()[::2][:3] == ["50.0 %", "50.0 %", "4"]
    assert page.locator(".figures").inner_text().count("1 of them never called") == 1
    assert page.locator("#heatmap").inner_text().split() == [
        *("layer", "q_proj", "v_proj", "avg"),
        *("0", "50.0", "25.0", "37.5"),
        *("1", "75.0", "–", "75.0"),
        *("avg", "62.5", "25.0", "50.0"),
    ]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, dark[4:-1].split(","))) < 64) == (scheme == "dark")
    assert page.locator("img").first.evaluate("(image) => image.naturalWidth") == 1


def test_a_complaint_fails_a_test(opened):
    page = opened(whole())
    page.evaluate("console.error('seen')")
    assert opened.complaints == ["seen"]
    opened.complaints.clear()


def test_text_is_shown_and_never_run(opened):
    hostile = [
        "<script>hacked = 1</script>",
        "</script><script>hacked = 1</script>",
        "<img src=x onerror='hacked = 1'>",
        "&lt;b&gt;",
    ]
    modules = {f"{text}.0.{text}": ModuleSparsity(0.5, 1, 2, 1, 0.0) for text in hostile}
    is_open = dict.fromkeys(modules, torch.ones(4).bool())
    view = tokengate.TokenView(hostile, is_open, title=hostile[0])
    page = opened(SparsityReport(modules).to_html(texts=[view], title=hostile[2]))
    assert page.locator(".token").all_text_contents() == hostile
    assert page.locator("h1").text_content() == page.title() == hostile[2]
    assert page.locator("#samples h3").text_content() == hostile[0]
    page.hover(".token >> nth=1")
    assert details(page)[0] == f"“{hostile[1]}”"
    page.hover("td button >> nth=1")
    assert details(page)[0] == f"{hostile[1]}.0.{hostile[1]}"
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0


def test_what_has_no_width_is_shown(opened):
    unseen = ["", " ", "\u200b", "\u2060\u00ad", "\u202e"]
    view = html_pages.text(tokens=unseen)
    page = opened(html_pages.report().to_html(texts=[view]))
    assert page.locator(".token").all_text_contents() == ["␣", "␣", "␣", "␣␣", "␣"]
    view = html_pages.text(tokens=["a\u200bb", "e\u0301", "語", "\U0001f468\u200d\U0001f469", "x"])
    page = opened(html_pages.report().to_html(texts=[view]))
    assert page.locator(".token").all_text_contents() == list(view.tokens)


def test_a_script_that_got_in_would_not_run(opened):
    """The page's policy stops it, should a token ever become markup."""
    page = opened(whole())
    page.evaluate("""
        const script = document.createElement("script");
        script.textContent = "hacked = 1";
        document.body.append(script);
    """)
    assert page.evaluate("typeof hacked") == "undefined"
    assert "Content Security Policy" in opened.complaints.pop()


def test_pointing_at_a_module_says_what_is_known_of_it(opened):
    page = opened(whole())
    cell(page, Q0).hover()
    wanted = [Q0, "sparsity", "50.0 %", "tau", "0.03125", "positions", "1,200", "modified", "600"]
    assert [line for line in details(page) if line] == [*wanted, "samples", "3"]
    cell(page, V0).hover()
    assert details(page)[0] == V0
    assert "none" in details(page)


def test_a_module_that_was_never_called_is_no_zero(opened):
    page = opened(whole())
    uncalled = cell(page, html_pages.V1)
    assert uncalled.get_attribute("aria-label") == "layers.1.v_proj: never called"
    assert uncalled.inner_text() == "–"
    uncalled.hover()
    assert "never called" in details(page)
    images = [
        c.evaluate("(e) => getComputedStyle(e).backgroundImage") for c in (uncalled, cell(page, Q0))
    ]
    assert images[0].startswith("repeating-linear-gradient")
    assert images[1] == "none"


def test_tokens_are_shaded_by_the_share_of_modules(opened):
    page = opened(whole())
    assert shares(page) == [1, 1 / 3, 0, 1 / 3, None]
    fills = page.locator(".token").evaluate_all(
        "a => a.map((e) => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(fills[:3])) == 3
    assert fills[1] == fills[3]
    assert page.locator(".token").all_inner_texts() == ["the", " cat", "↵", "␣␣", "<pad>"]
    assert page.locator(".token.padding").all_inner_texts() == ["<pad>"]
    # (3 + 1 + 0 + 1) of 4 x 3: padding is not counted.
    summary = page.locator("#samples p").nth(1).inner_text()
    assert summary == "4 tokens and 1 of padding; 41.7 % modified on average over 3 modules"


def test_pointing_at_a_token_says_which_layers_modified_it(opened):
    page = opened(whole())
    page.hover(".token >> nth=0")
    said = [line for line in details(page) if line]
    assert said[:2] == ["“the”", "token 1 of 5: modified by 3 of 3 modules, 100.0 %"]
    assert said[2:] == ["layer 0", "q_proj, v_proj", "layer 1", "q_proj"]
    assert page.locator("td button.modifies").all_inner_texts() == ["50.0", "25.0", "75.0"]
    page.hover(".token >> nth=3")
    assert [line for line in details(page) if line][2:] == ["layer 0", "v_proj"]
    assert page.locator("td button.modifies").all_inner_texts() == ["25.0"]
    page.hover(".token >> nth=4")
    assert "padding" in details(page)[-1]


def test_long_lists_of_projections_are_shortened(opened):
    names = [f"layers.{i}.part{j}" for i in range(2) for j in range(4)]
    report = SparsityReport({name: ModuleSparsity(0.5, 1, 2, 1, 0.0) for name in names})
    is_open = {name: torch.tensor([name != "layers.1.part2"]) for name in names}
    page = opened(report.to_html(texts=[tokengate.TokenView(["a"], is_open)]))
    page.hover(".token")
    said = [line for line in details(page) if line]
    assert said[2:] == ["layer 0", "all", "layer 1", "all but part2"]


def test_choosing_modules_filters_the_tokens(opened):
    page = opened(whole())
    before = shares(page)
    assert page.locator("#chosen").inner_text() == "All 4 modules"
    assert page.locator("#all").is_disabled()
    cell(page, Q0).click()
    assert shares(page) == [1, 1, 0, 0, None] != before
    assert page.locator("#chosen").inner_text() == f"1 of 4 modules chosen: {Q0}"
    assert cell(page, Q0).get_attribute("aria-pressed") == "true"
    assert page.get_by_label("layer 0").get_attribute("aria-pressed") == "mixed"
    cell(page, V0).click()
    assert shares(page) == [1, 1 / 2, 0, 1 / 2, None]
    assert page.get_by_label("layer 0").get_attribute("aria-pressed") == "true"
    page.locator("#all").click()
    assert shares(page) == before
    assert page.locator('[aria-pressed="true"]').count() == 0


def test_choosing_a_layer_or_a_projection(opened):
    page = opened(whole())
    page.get_by_label("projection q_proj").click()
    assert shares(page) == [1, 1 / 2, 0, 0, None]
    page.get_by_label("layer 1").click()
    assert page.locator("#chosen").inner_text().startswith("3 of 4 modules chosen")
    page.get_by_label("layer 1").click()
    assert page.locator("#chosen").inner_text() == f"1 of 4 modules chosen: {Q0}"
    page.get_by_label("layer 0").click()
    page.hover(".token >> nth=3")
    cell(page, V0).click()
    assert shares(page) == [1, 1, 0, 0, None]


def test_modules_that_did_not_see_a_text_shade_nothing(opened):
    page = opened(whole())
    cell(page, html_pages.V1).click()
    assert page.locator(".token.unseen").count() == 4
    assert "none of the chosen modules saw" in page.locator("#samples p").nth(1).inner_text()
    assert shares(page, ".patch") == [1, 0, 0, 0, 0, 1]


def test_patches_lie_on_the_picture(opened):
    page = opened(whole())
    assert shares(page, ".patch") == [1, 0, 1 / 2, 0, 0, 1 / 2]
    picture = page.locator(".shaded img").bounding_box()
    boxes = [page.locator(".patch").nth(i).bounding_box() for i in range(6)]
    for i, box in enumerate(boxes):
        row, column = divmod(i, 3)
        assert box["x"] == pytest.approx(picture["x"] + column * picture["width"] / 3, abs=1)
        assert box["y"] == pytest.approx(picture["y"] + row * picture["height"] / 2, abs=1)
        assert box["width"] == pytest.approx(picture["width"] / 3, abs=1)
    page.hover(".patch >> nth=5")
    assert details(page)[0] == "patch"
    assert "row 2, column 3: modified by 1 of 2 modules, 50.0 %" in details(page)


def test_the_keyboard_reaches_everything(opened):
    page = opened(whole())
    for button in ("modules as CSV", "tokens as CSV", "all as JSON", "Sparsity"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == button
    page.keyboard.press("ArrowRight")
    assert page.locator('[role="tab"][aria-selected="true"]').inner_text() == "tau"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")  # one stop for the heatmap, on its first projection
    assert page.evaluate("document.activeElement.ariaLabel") == "projection q_proj"
    page.keyboard.press("ArrowDown")
    assert details(page)[0] == Q0
    page.keyboard.press("ArrowRight")
    assert details(page)[0] == V0
    page.keyboard.press("ArrowRight")  # the averages are no buttons
    assert details(page)[0] == V0
    page.keyboard.press("Enter")
    assert page.locator("#chosen").inner_text() == f"1 of 4 modules chosen: {V0}"
    assert shares(page) == [1, 0, 0, 1, None]
    for _ in ("relative to the largest share", "the first token"):
        page.keyboard.press("Tab")
    assert details(page)[0] == "“the”"
    page.keyboard.press("ArrowRight")
    assert details(page)[0] == "“ cat”"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert any(line.startswith("row 2, column 1") for line in details(page))


INK_AND_FILL = """all => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const pixel = (colour) => {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const style = (e) => getComputedStyle(e);
    return all.map((e) => [pixel(style(e).color), pixel(style(e).backgroundColor)]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_and_tokens_are_legible_and_colours_ordered(opened, scheme):
    steps = 40
    modules = {f"layers.{i}.q": ModuleSparsity(i / steps, 1, 2, 1, 0.0) for i in range(steps + 1)}
    # Token i is modified by the first i modules.
    is_open = {name: torch.arange(steps + 2) > number for number, name in enumerate(modules)}
    view = tokengate.TokenView(["x"] * (steps + 2), is_open)
    page = opened(SparsityReport(modules).to_html(texts=[view]), scheme)
    for kind in ("td button", ".token"):
        read = page.locator(kind).evaluate_all(INK_AND_FILL)
        inks, fills = (
            [luminance([c / 255 for c in colours[which]]) for colours in read] for which in (0, 1)
        )
        assert len(fills) > steps
        # Lighter or darker at every step: the order is seen without seeing hues.
        assert fills == sorted(fills, reverse=scheme == "light")
        assert abs(fills[0] - fills[-1]) > 0.1
        for ink, fill in zip(inks, fills, strict=True):
            assert (max(ink, fill) + 0.05) / (min(ink, fill) + 0.05) >= 4.5


def test_large_reports_are_painted_soon(opened):
    report, view = html_pages.large()
    html = report.to_html(texts=[view])
    assert len(html.encode()) < 5_000_000
    page = opened(html)
    assert page.locator(".token").count() == 2000
    assert page.locator("td button").count() == 224
    # Not wait_for_function, whose polling evaluates a string, which the page's policy forbids.
    painted = page.evaluate("""() => new Promise((done) => new PerformanceObserver((seen) => {
        const [paint] = seen.getEntriesByName("first-contentful-paint");
        if (paint) done(paint.startTime);
    }).observe({ type: "paint", buffered: true }))""")
    assert 0 < painted < 2000  # milliseconds
    page.hover(".token >> nth=100")
    assert details(page)[0] == "“ token100”"


def test_in_print_it_is_light_and_whole(opened):
    page = opened(whole(), "dark")
    assert page.locator("aside").is_visible()
    page.emulate_media(media="print")
    assert not page.locator("aside").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#heatmap").is_visible()


def test_on_a_narrow_screen_nothing_is_cut_off(opened):
    page = opened(whole(), viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("kind", ["", "<!doctype html>"])
def test_a_notebooks_table_keeps_the_notebooks_colours(opened, kind):
    table = html_pages.report()._repr_html_()
    page = opened(f"{kind}<div style='background: #111; color: #ddd'>{table}</div>")
    for text in ("q_proj", "37.5", "-"):  # a heading, an average, and what was never called
        ink = page.get_by_text(text, exact=True).evaluate("(e) => getComputedStyle(e).color")
        assert ink == "rgb(221, 221, 221)"
    ink = page.get_by_text("50.0", exact=True).first.evaluate("(e) => getComputedStyle(e).color")
    assert ink == "rgb(0, 0, 0)"
