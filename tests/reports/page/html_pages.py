"""A small report and its samples, of which every number on the page is known by hand."""

import base64
from dataclasses import replace

import pytest
import torch

import tokengate
from tokengate.reports.report import ModuleSparsity, SparsityReport

# The smallest PNG there is: one grey pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAsRMyIgAAAABJRU5ErkJggg=="
)
Q0, V0, Q1, V1 = (f"layers.{layer}.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj"))
TOKENS = ["the", " cat", "\n", "  ", "<pad>"]
IS_OPEN = {
    Q0: torch.tensor([1, 1, 0, 0, 1]).bool(),
    V0: torch.tensor([1, 0, 0, 1, 1]).bool(),
    Q1: torch.tensor([1, 0, 0, 0, 1]).bool(),
}
REAL = torch.tensor([1, 1, 1, 1, 0]).bool()


NEW = "layers.2.q_proj"
ABOUT = {"model": "Net", "method": "lora", "lambda": "1e-05", "date": "2026-11-28 13:00 UTC"}


def report():
    """Two layers of two projections, the last of which was never called."""
    return SparsityReport(
        {
            Q0: ModuleSparsity(0.5, 3, 1200, 600, 0.03125),
            V0: ModuleSparsity(0.25, 3, 1200, 900, None),
            Q1: ModuleSparsity(0.75, 3, 1200, 300, float("nan")),
            V1: ModuleSparsity(float("nan"), 0, 0, 0, 0.5),
        },
        ABOUT,
    )


def other():
    """Another one: it lacks two of the modules, and has a new one."""
    return SparsityReport(
        {
            Q0: ModuleSparsity(0.75, 1, 4, 1, 0.0625),
            Q1: ModuleSparsity(0.25, 1, 4, 3, 0.25),
            NEW: ModuleSparsity(1.0, 1, 4, 0, 1.0),
        },
        ABOUT | {"date": "2026-11-28 14:00 UTC"},
    )


def detailed():
    """The same with r and places: (r, tau) are by hand in `test_html_report_in_browser`."""
    ratios = [0] * 162
    ratios[97], ratios[93], ratios[89] = 300, 600, 300  # 1, 1/2 and 1/4
    by_position = ((300, 300), (300, 150), (300, 75), (300, 75))
    modules = report().modules
    modules[Q0] = replace(modules[Q0], tau=0.5, ratios=tuple(ratios), by_position=by_position)
    return SparsityReport(modules, ABOUT)


def effects():
    """The text with r, words and what came of it."""
    ratios = {Q0: torch.tensor([1.0, 1.0, 0.25, 0.25, 0.5])}
    return text(
        ratios=ratios,
        words=[0, 0, 1, 2, 3],
        log_prob=torch.tensor([float("nan"), 0.5, -1.0, 0.25, float("nan")]),
        kl=torch.tensor([float("nan"), 0.2, 0.8, 0.1, float("nan")]),
    )


def text(**changes):
    return tokengate.TokenView(**{"tokens": TOKENS, "is_open": IS_OPEN, "real": REAL, **changes})


def image(**changes):
    grids = {
        Q0: torch.tensor([[1, 0, 1], [0, 0, 0]]).bool(),
        V1: torch.tensor([[1, 0, 0], [0, 0, 1]]).bool(),
    }
    return tokengate.PatchView(**{"image": PNG, "is_open": grids, **changes})


def large(tokens=2000, layers=32, projections=7):
    """A report as of a model with 7 billion parameters, and one long text."""
    names = [f"model.layers.{i}.mlp.part_{j}" for i in range(layers) for j in range(projections)]
    modules = {name: ModuleSparsity(0.5, 100, 10**6, 5 * 10**5, 0.03125) for name in names}
    is_open = {name: torch.rand(tokens) < 0.5 for name in names}
    words = [f" token{i}" for i in range(tokens)]
    return SparsityReport(modules), tokengate.TokenView(words, is_open)


def whole():
    return report().to_html(texts=[text()], images=[image()])


def cell(page, name):
    """Of the sparsities."""
    return page.locator(f'#panel-sparsity td button[aria-label^="{name}:"]')


def details(page):
    return page.locator("#details").inner_text().split("\n")


def shares(page, kind=".token"):
    """The share that each token or patch is shaded by; None for padding."""
    read = "all => all.map((e) => e.style.getPropertyValue('--value'))"
    values = page.locator(kind).evaluate_all(read)
    return [pytest.approx(float(value)) if value else None for value in values]
