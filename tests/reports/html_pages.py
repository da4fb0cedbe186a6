"""A small report and its samples, of which every number on the page is known by hand."""

import base64

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


def report():
    """Two layers of two projections, the last of which was never called."""
    return SparsityReport(
        {
            Q0: ModuleSparsity(0.5, 3, 1200, 600, 0.03125),
            V0: ModuleSparsity(0.25, 3, 1200, 900, None),
            Q1: ModuleSparsity(0.75, 3, 1200, 300, float("nan")),
            V1: ModuleSparsity(float("nan"), 0, 0, 0, 0.5),
        }
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
