"""All variants of every setting that was asked for, measured and reported."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from results import Found, report
from settings import Setting, settings
from torch import nn
from variants import GATED, models, sparsity, tokens


def compare(
    options: argparse.Namespace,
    measure: Callable[[dict[str, nn.Module], Setting], Found],
    unit: str,
) -> None:
    """`measure` gives the cases of one setting, whose variants it gets."""
    found, closed = {}, {}
    for setting in settings(options):
        variants = models(setting, options.same_dtype)
        found |= measure(variants, setting)
        closed[str(setting)] = sparsity(variants[GATED], tokens(setting))
    report(found, unit, options, sparsity=closed)
