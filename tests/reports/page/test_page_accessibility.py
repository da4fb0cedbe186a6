"""SparsityReport.to_html judged by axe-core in a real Chromium: WCAG 2.2 AA, and good practice."""

from importlib.resources import files

import html_pages
import pytest

TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def violations(page, within="html"):
    """What axe-core finds in a part of the page, and how many of its rules found nothing."""
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python has axe.min.js")
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text())
    found = page.evaluate("([at, tags]) => axe.run(at, { runOnly: tags })", [within, TAGS])
    said = [
        f"{each['id']}: {node['target']} {node['failureSummary']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]
    return said, len(found["passes"])


def whole():
    return html_pages.detailed().to_html(
        texts=[html_pages.effects()],
        images=[html_pages.image()],
        beside=html_pages.other(),
        names=("before", "after"),
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(opened, width, scheme):
    page = opened(whole(), scheme, viewport={"width": width, "height": 844})
    page.click(".token >> nth=1")
    found, passed = violations(page)
    assert found == []
    assert passed > 30
    for tab in ("tau", "r", "course"):
        page.click(f"#tab-{tab}")
        found, passed = violations(page, f"#panel-{tab}")
        assert found == []
        assert passed > 5


def test_axe_would_find_something(opened):
    page = opened(whole())
    page.evaluate("document.querySelector('.patch').removeAttribute('aria-label')")
    page.evaluate("document.querySelector('h1').style.color = 'silver'")
    found, _ = violations(page)
    assert {each.split(":")[0] for each in found} == {"button-name", "color-contrast"}
