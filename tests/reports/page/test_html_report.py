"""SparsityReport.to_html and _repr_html_: what is in the text of the page."""

import base64
import dataclasses
import hashlib
import json
import math
import re

import html_pages
import pytest
import torch
from html_pages import IS_OPEN, NEW, Q0, Q1, V0, V1
from hypothesis import given
from hypothesis import strategies as st
from models import Net, away_from_initialisation, one_sentence

import tokengate
from tokengate.reports.page.html_table import html_table
from tokengate.reports.page.words import words_of
from tokengate.reports.report import ModuleSparsity, SparsityReport

HOSTILE = "</script><script>alert(1)</script><!--&lt;"


def data(page):
    """The page's JSON."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found)


def booleans(packed, rows, length):
    octets = base64.b64decode(packed)
    width = -(-length // 8)
    assert len(octets) == rows * width
    return [
        [bool(octets[r * width + i // 8] >> (i % 8) & 1) for i in range(length)]
        for r in range(rows)
    ]


def test_the_page_has_the_reports_numbers():
    found = data(html_pages.report().to_html())
    (report,) = found["reports"]
    assert (found["rows"], found["columns"]) == (["0", "1"], ["q_proj", "v_proj"])
    assert report["row_averages"] == [0.375, 0.75]
    assert report["column_averages"] == [0.625, 0.25]
    assert report["sparsity"] == 0.5
    assert [(m["row"], m["column"]) for m in found["modules"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [m["sparsity"] for m in report["modules"]] == [0.5, 0.25, 0.75, None]
    assert [m["tau"] for m in report["modules"]] == ["0.03125", None, "nan", "0.5"]
    assert report["modules"][0]["modified"] == 600
    assert found["views"] == []


def test_samples_by_hand():
    report = html_pages.report()
    text, image = data(report.to_html(texts=[html_pages.text()], images=[html_pages.image()]))[
        "views"
    ]
    assert text["tokens"] == html_pages.TOKENS
    assert text["modules"] == [0, 1, 2]
    assert base64.b64decode(text["open"]) == bytes([0b10011, 0b11001, 0b10001])
    assert base64.b64decode(text["real"]) == bytes([0b01111])
    assert (image["rows"], image["columns"], image["modules"]) == (2, 3, [0, 3])
    assert base64.b64decode(image["open"]) == bytes([0b000101, 0b100001])
    assert base64.b64decode(image["real"]) == bytes([0b111111])
    assert image["source"] == f"data:image/png;base64,{base64.b64encode(html_pages.PNG).decode()}"


def test_a_merged_patch_shades_all_that_it_came_from():
    fine = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    coarse = torch.tensor([[1, 0]]).bool()
    view = html_pages.image(is_open={Q0: coarse, V1: fine})
    (found,) = data(html_pages.report().to_html(images=[view]))["views"]
    assert (found["rows"], found["columns"]) == (2, 4)
    merged, whole = booleans(found["open"], 2, 8)
    assert merged == [True, True, False, False] * 2
    assert whole == fine.flatten().tolist()


@given(rows=st.integers(1, 4), length=st.integers(1, 40), seed=st.integers(0, 99))
def test_every_bit_comes_back(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(rows, length, generator=generator) < 0.5
    names = [f"layers.{i}.q" for i in range(rows)]
    report = SparsityReport({name: ModuleSparsity(0.5, 1, 2, 1, 0.0) for name in names})
    view = tokengate.TokenView(["x"] * length, dict(zip(names, s, strict=True)), s[0])
    (found,) = data(report.to_html(texts=[view]))["views"]
    assert booleans(found["open"], rows, length) == s.tolist()
    assert booleans(found["real"], 1, length) == s[:1].tolist()


def test_a_recorded_model():
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj", "v_proj"], tau=1.0))
    with tokengate.record(model, positions=True) as rec:
        model(torch.randn(2, 11, 8))
    is_open = {name: calls[0][1] for name, calls in rec.positions.items()}
    (found,) = data(rec.report().to_html(texts=[tokengate.TokenView(["x"] * 11, is_open)]))["views"]
    wanted = [s.tolist() for s in is_open.values()]
    assert {True, False} <= {bit for row in wanted for bit in row}
    assert booleans(found["open"], 4, 11) == wanted


def test_what_is_said_cannot_end_the_script():
    modules = {f"{HOSTILE}.0.{HOSTILE}": ModuleSparsity(0.5, 1, 2, 1, 0.0)}
    (name,) = modules
    view = tokengate.TokenView([HOSTILE], {name: torch.tensor([True])}, title=HOSTILE)
    hostile = SparsityReport(modules, {HOSTILE: HOSTILE})
    page = hostile.to_html(texts=[view], title=HOSTILE, beside=hostile, names=(HOSTILE, HOSTILE))
    harmless = html_pages.report().to_html(texts=[html_pages.text(tokens=["a"] * 5)])
    for tag in ("<script", "</script", "<!--"):
        assert page.count(tag) == harmless.count(tag), tag
    found = data(page)
    assert found["modules"][0]["name"] == name
    assert found["views"][0]["tokens"] == [found["views"][0]["title"]] == [HOSTILE]
    assert found["reports"][1]["name"] == HOSTILE
    assert found["reports"][1]["about"] == {HOSTILE: HOSTILE}
    assert "<title>&lt;/script&gt;" in page


def test_nothing_but_the_pages_own_script_and_style_may_run():
    page = html_pages.report().to_html()
    (policy,) = re.findall('Content-Security-Policy" content="(.*?)"', page)
    for tag, kind in (("<style>", "style"), ("<script>", "script")):
        own = page.split(tag)[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not re.search("https?://|unsafe", page)


def test_a_title_may_have_what_a_template_replaces():
    assert "<h1>$data costs $5</h1>" in html_pages.report().to_html(title="$data costs $5")


def test_the_file_is_the_page_and_a_refusal_leaves_the_old_one(tmp_path):
    path = tmp_path / "made" / "report.html"
    page = html_pages.report().to_html(path, texts=[html_pages.text(tokens=["ü", "語", *"abc"])])
    assert path.read_text(encoding="utf-8") == page
    with one_sentence("texts[0]"):
        html_pages.report().to_html(path, texts=["a text"])
    assert path.read_text(encoding="utf-8") == page
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_an_image_by_its_path(tmp_path):
    path = tmp_path / "pixel.png"
    path.write_bytes(html_pages.PNG)
    assert path.read_bytes() == html_pages.PNG
    found = [
        html_pages.report().to_html(images=[html_pages.image(image=i)]) for i in (path, str(path))
    ]
    assert found == [html_pages.report().to_html(images=[html_pages.image()])] * 2


def test_large_reports_stay_small():
    report, view = html_pages.large()
    size = len(report.to_html(texts=[view]).encode())
    assert size > 2000 * 224 / 8
    assert size < 300_000


def test_of_many_samples_the_page_has_the_sums():
    plain = ModuleSparsity(0.5, 10**5, 10**6, 5 * 10**5, 0.03125)
    details = dataclasses.replace(
        plain,
        ratios=(0, 7, 0, 2) + (0,) * 158,
        by_sample=(0.5,) * 10**5,
        by_position=((10**5, 1),) * 200,
    )
    pages = [SparsityReport({Q0: module}).to_html() for module in (plain, details)]
    assert len(pages[0]) < len(pages[1]) < len(pages[0]) + 2000
    (report,) = data(pages[1])["reports"]
    assert report["modules"][0]["ratios"] == [1, 7, 0, 2]
    # Three places share a point of the curve, so that there are no more than 96.
    assert report["places"] == {"width": 3, "positions": [[3 * 10**5] * 66 + [2 * 10**5]]}
    assert report["modules"][0]["places"] == [0, *[3] * 66, 2]


def test_two_reports_side_by_side():
    one, other = html_pages.report(), html_pages.other()
    found = data(one.to_html(beside=other, names=("a", "b")))
    assert [r["name"] for r in found["reports"]] == ["a", "b"]
    assert [m["name"] for m in found["modules"]] == [Q0, V0, Q1, V1, NEW]
    wanted = [[0.5, 0.25, 0.75, None, "-"], [0.75, "-", 0.25, "-", 1.0]]
    for report, shares in zip(found["reports"], wanted, strict=True):
        assert [m["sparsity"] if m else "-" for m in report["modules"]] == shares
    assert found["reports"][0]["row_averages"] == [0.375, 0.75, None]
    assert found["reports"][1]["row_averages"] == [0.75, 0.25, 1.0]
    texts = [html_pages.text(is_open={NEW: IS_OPEN[Q0]})]
    assert data(one.to_html(beside=other, texts=texts))["views"][0]["modules"] == [4]
    with one_sentence(NEW, "no module of this report"):
        one.to_html(texts=texts)
    with one_sentence("to_html", "{}", "SparsityReport"):
        one.to_html(beside={})


def test_it_says_where_it_comes_from():
    page = html_pages.report().to_html()
    assert [f"{what} <b>" in page for what in html_pages.ABOUT] == [True] * len(html_pages.ABOUT)
    assert "lambda <b>1e-05</b>" in page
    assert 'class="about"' not in SparsityReport(html_pages.report().modules).to_html()


def test_effects_and_ratios_by_hand():
    nan, inf = math.nan, math.inf
    # A byte for r is 1 + 8 (log2 r + 22): of 1 it is 177, of 2^-22 and less 1, above 2^9 254.
    levels = torch.tensor([1.0, 0.0, 2.0**-30, inf, nan])
    view = html_pages.text(
        ratios={Q0: levels, V0: levels.half()},
        log_prob=torch.tensor([nan, 0.123456, -2.0, inf, 0.0]),
        kl=torch.tensor([nan, 1e-9, 0.5, inf, 0.0]),
        words=[None, 3, 3, None, None],
    )
    (found,) = data(html_pages.report().to_html(texts=[view]))["views"]
    assert [*base64.b64decode(found["ratios"])] == [177, 1, 1, 254, 0] * 2 + [0] * 5
    assert found["log_prob"] == [None, 0.1235, -2.0, None, 0.0]
    assert found["kl"] == [None, 1e-9, 0.5, None, 0.0]
    assert found["words"] == [0, 1, 1, 2, 3]
    (plain,) = data(html_pages.report().to_html(texts=[html_pages.text()]))["views"]
    assert [plain[key] for key in ("ratios", "log_prob", "kl")] == [None] * 3


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("[CLS] token ##gate . q _ pro ##j [SEP] [PAD]", [0, 1, 1, 2, 3, 4, 5, 5, 6, 7]),
        ("<s> ▁The ▁to ken . ▁ ab c", [0, 1, 2, 2, 3, 4, 4, 4]),
        ("ĠThe Ġto ken 's Ċ x", [0, 1, 1, 1, 2, 3]),
        ("a b", [0, 1]),
    ],
)
def test_words_of_sub_words(tokens, words):
    assert words_of(tokens.split(" ")) == words


def test_words_of_decoded_tokens():
    assert words_of(["the", " cat", "s", "\n", "  ", "x"]) == [0, 1, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: html_pages.text(tokens="the cat"), ["'the cat'", "list of strings"]),
        (lambda: html_pages.text(tokens=[1, 2, 3, 4, 5]), ["[1, 2, 3, 4, 5]", "list of strings"]),
        (lambda: html_pages.text(tokens=None), ["tokens=None", "list of strings"]),
        (lambda: html_pages.text(is_open=IS_OPEN[Q0]), ["is_open=tensor", "S by module"]),
        (lambda: html_pages.text(tokens=["a"]), [Q0, "(5,)", "(1,)", "each token"]),
        (lambda: html_pages.text(tokens=[], is_open={Q0: torch.ones(0).bool()}), ["at least one"]),
        (lambda: html_pages.text(is_open={}), ["is_open={}", "no module"]),
        (lambda: html_pages.text(is_open={Q0: torch.ones(5)}), [Q0, "boolean"]),
        (lambda: html_pages.text(is_open={Q0: [True] * 5}), [Q0, "boolean"]),
        (lambda: html_pages.text(real=torch.ones(4).bool()), ["real", "(4,)", "(5,)"]),
        (lambda: html_pages.text(kl=torch.ones(4)), ["kl", "(4,)", "(5,)"]),
        (lambda: html_pages.text(kl=[0.0] * 5), ["kl", "no floating-point tensor"]),
        (lambda: html_pages.text(log_prob=torch.ones(5).long()), ["log_prob", "floating-point"]),
        (lambda: html_pages.text(ratios={Q0: torch.ones(2)}), [Q0, "(2,)", "(5,)"]),
        (lambda: html_pages.text(words=[0, 1]), ["words", "2 numbers for 5 tokens"]),
        (
            lambda: html_pages.image(image=torch.zeros(3, 8, 8)),
            ["a Tensor", "PNG or JPEG", "its path or its bytes"],
        ),
        (lambda: html_pages.image(image=b"GIF89a"), ["GIF89a", "neither a PNG nor a JPEG"]),
        (lambda: html_pages.image(is_open={}), ["is_open={}", "no module"]),
        (lambda: html_pages.image(is_open=IS_OPEN), [Q0, "(5,)", "(rows, columns)"]),
        (lambda: html_pages.image(is_open={Q0: [[True]]}), [Q0, "(rows, columns)"]),
        (lambda: html_pages.image(is_open={Q0: torch.ones(2, 0).bool()}), [Q0, "(2, 0)"]),
        (
            lambda: html_pages.image(
                is_open={Q0: torch.ones(4, 4).bool(), V1: torch.ones(2, 3).bool()}
            ),
            [V1, "(2, 3)", "does not divide", "(4, 4)"],
        ),
        (
            lambda: html_pages.image(
                is_open={Q0: torch.ones(4, 2).bool(), V1: torch.ones(2, 3).bool()}
            ),
            [Q0, "(4, 2)", "does not divide", "(4, 3)"],
        ),
    ],
)
def test_samples_that_do_not_fit(make, words):
    with one_sentence(*words):
        make()


def test_samples_of_another_model():
    report = html_pages.report()
    other = html_pages.text(is_open={"layers.7.q_proj": IS_OPEN[Q0]})
    with one_sentence("texts[1]", "'layers.7.q_proj'", "no module of this report"):
        report.to_html(texts=[html_pages.text(), other])
    with one_sentence("texts=TokenView", "a list of tokengate.TokenView"):
        report.to_html(texts=html_pages.text())
    with one_sentence("images[0]", "PatchView"):
        report.to_html(images=[html_pages.text()])


def test_a_notebook_gets_a_table_by_hand():
    page = html_pages.report()._repr_html_()
    rows = re.findall("<tr>(.*?)</tr>", page)
    cells = [re.sub("<.*?>", " ", row).split() for row in rows]
    assert cells == [
        ["layer", "q_proj", "v_proj", "avg"],
        ["0", "50.0", "25.0", "37.5"],
        ["1", "75.0", "-", "75.0"],
        ["avg", "62.5", "25.0", "50.0"],
    ]
    assert page.count("background") == 3  # neither averages nor what was never called
    assert "1 modules were never called" in page
    page = SparsityReport({HOSTILE: ModuleSparsity(0.5, 1, 2, 1, 0.0)})._repr_html_()
    assert page.count("&lt;/script&gt;") == 4  # two in its row, two in its column
    assert "<script" not in page


def luminance(rgb):
    """WCAG's relative luminance of sRGB in [0, 1]."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_tables_numbers_are_legible_and_its_colours_ordered():
    shares = [i / 100 for i in range(101)]
    table = html_table(["q"], [""] * 101, [[share] for share in shares], [[""]] * 101)
    colours = re.findall(r"rgb\((\d+),(\d+),(\d+)\);color:#(...)", table)
    fills = [luminance([int(c) / 255 for c in colour[:3]]) for colour in colours]
    assert fills == sorted(fills, reverse=True)
    assert len(set(fills)) == 101
    for fill, (*_, ink) in zip(fills, colours, strict=True):
        contrast = (fill + 0.05) / 0.05 if ink == "000" else 1.05 / (fill + 0.05)
        assert contrast >= 4.5
