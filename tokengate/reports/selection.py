"""Which modules to adapt in the next run, by what was measured in this one (Table 4, Figure 8)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from numbers import Real
from typing import Any

from tokengate.arguments import choice, count, finite
from tokengate.errors import TokenGateError, brief
from tokengate.patterns import FullName
from tokengate.reports.report import SparsityReport

_NORMS = {"norm_relative": "relative", "norm_abs": "absolute"}


class Importance(dict[str, float]):
    """A number for each module that is the higher the more it matters, as sparsity is not."""


def select(
    report: SparsityReport | Mapping[str, float],
    fraction: float = 0.5,
    by: str = "sparsity",
    keep: str | None = None,
    *,
    seed: int = 0,
) -> list[str]:
    """The modules that the next run should adapt (section 5 of the gate's paper):

        names = tokengate.select(rec.report(), fraction=0.5)  # S_low_50% of Table 4
        tokengate.patch(fresh_model, names, method="dora", gate=False)

    Low sparsity says that a module modified many positions, which the paper takes for importance.
    The rows of Table 4, with `norms = modification_norms(model, batches)`:

    | row | call |
    |---|---|
    | S_low | `select(report, fraction)` |
    | S_high | `select(report, fraction, keep="highest")` |
    | norm_relative | `select(norms.relative, fraction)` |
    | norm_abs | `select(norms.absolute, fraction)` |
    | random | `select(report, fraction, by="random", seed=...)` |

    and beside them, with `scores = fisher_scores(model, batches)`, what the loss itself says,

    | row | call |
    |---|---|
    | fisher | `select(scores, fraction, by="fisher")` |

    which `suggest` does in one call. half_rank adapts all modules at half the rank. What a smaller
    fraction selects, a larger one does too.

    Args:
        report: of the run that was measured; or a number for each module by name, in the model's
            order, that takes the place of sparsity.
        fraction: the share of modules to select, in (0, 1]; the nearest whole number of them, at
            least one.
        by: "sparsity" (eq. 23); "fisher", where the numbers are `fisher_scores`; or "random", which
            draws the modules.
        keep: "lowest" or "highest"; by default the highest of what `fisher_scores` and
            `modification_norms` return, and of "fisher", else the lowest. Of modules with equal
            numbers the first are kept.
        seed: for "random": every seed is another draw.

    Returns:
        Full names in the model's order. `patch` takes each for the one module of this name. Read
        back from a file they are plain strings, which are suffixes like any other. What the first
        run did before it patched (`split_attention`) or passed to it (`slices=`) the next has to
        do again.

    Raises:
        TokenGateError: an argument is wrong; a module was never called and has no sparsity; all of
            fisher's scores are 0, as those of an untrained model are.
    """
    check_fraction(fraction)
    numbers = _numbers(report)
    if by in _NORMS:
        raise TokenGateError(
            f"by={by!r} was asked, which no report has: pass "
            f"tokengate.modification_norms(model, batches).{_NORMS[by]} in place of the report."
        )
    by = choice("by", by, ("sparsity", "fisher", "random"))
    if keep is None:
        keep = "highest" if by == "fisher" or isinstance(report, Importance) else "lowest"
    keep = choice("keep", keep, ("lowest", "highest"))
    if by == "random":
        draw = random.Random(count("seed", seed, least=0))
        numbers = {name: draw.random() for name in numbers}
    if by == "fisher" and isinstance(report, SparsityReport):
        raise TokenGateError(
            "by='fisher' was asked, which no report has: pass tokengate.fisher_scores(model, "
            "batches) in place of the report."
        )
    if by == "fisher" and not any(numbers.values()):
        raise TokenGateError(
            "all of fisher's scores are 0, as M(x) is before it was trained: train some steps "
            "first, or call tokengate.suggest(model, batches), which takes one by itself."
        )
    for name, number in numbers.items():
        if not isinstance(number, Real) or number != number:
            raise TokenGateError(
                f"{name!r} has {brief(number)} in place of a number, as a module has that was "
                "never called: measure with data that reaches it, or do not patch it in that run."
            )
    # Sorting keeps the order of equals.
    ranked = sorted(numbers, key=lambda name: numbers[name] * (1 if keep == "lowest" else -1))
    kept = set(ranked[: max(1, round(fraction * len(ranked)))])
    return [FullName(name) for name in numbers if name in kept]


def check_fraction(fraction: float) -> None:
    """An error if it is no share of modules to select."""
    if not 0 < finite("fraction", fraction) <= 1:
        raise TokenGateError(
            f"fraction={brief(fraction)} is not in (0, 1]: pass a share of the modules, e.g. 0.5."
        )


def _numbers(report: Any) -> Mapping[str, float]:
    numbers = report.by_module if isinstance(report, SparsityReport) else report
    if not isinstance(numbers, Mapping) or not numbers:
        raise TokenGateError(
            f"select was given {brief(report)}: pass what rec.report() returns, or a number for "
            "each module by name."
        )
    return numbers
