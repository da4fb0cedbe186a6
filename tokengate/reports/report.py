"""Sparsity by module, by layer and projection, and overall (eq. 23, Table 5)."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokengate.arguments import choice, unused
from tokengate.errors import TokenGateError, brief
from tokengate.files.atomic_write import write_text
from tokengate.files.text_table import markdown_table, text_table
from tokengate.reports.histogram import RATIO_EDGES, Histogram, histogram_of
from tokengate.reports.module_sparsity import ModuleSparsity as ModuleSparsity
from tokengate.reports.page.html_page import html_page
from tokengate.reports.page.html_table import html_table
from tokengate.reports.page.report_data import Shown
from tokengate.reports.page.sample_views import PatchView, TokenView
from tokengate.reports.picture import load_plots, picture
from tokengate.reports.report_file import read_report, write_report
from tokengate.reports.tables.module_table import csv_of, frame_of, summary
from tokengate.reports.tables.report_difference import ReportDifference, report_difference
from tokengate.reports.tables.sparsity_table import (
    SparsityTable,
    mean,
    std,
    table_of,
    value,
)


class SparsityReport:
    """Sparsity: the share of positions that the modifications left alone (eq. 23).

    Attributes:
        modules: everything known of each module, by name.
        about: what was recorded, by what it is: "model", "method", "gate", "rank", "scale",
            "lambda", "versions" and "date", as far as it is known.
    """

    def __init__(
        self, modules: dict[str, ModuleSparsity], about: dict[str, str] | None = None
    ) -> None:
        self.modules = modules
        self.about = {} if about is None else about

    @property
    def by_module(self) -> dict[str, float]:
        """Sparsity of each module, in [0, 1]; NaN where it was never called."""
        return {name: module.sparsity for name, module in self.modules.items()}

    @property
    def sparsity(self) -> float:
        """Sparsity averaged over samples, then over the modules that were called (eq. 23)."""
        return mean(self.by_module.values())

    @property
    def std(self) -> float:
        """Standard deviation (population) of sparsity over the modules that were called."""
        return std(self.by_module.values())

    @property
    def token_sparsity(self) -> float:
        """Share of unmodified positions over all positions of all modules together."""
        positions = sum(module.positions for module in self.modules.values())
        modified = sum(module.modified for module in self.modules.values())
        return 1 - modified / positions if positions else math.nan

    @property
    def broken_taus(self) -> dict[str, str]:
        """The modules whose tau is not finite, as "nan", "inf" or "-inf": no gate is theirs."""
        return {n: m.broken_tau for n, m in self.modules.items() if m.broken_tau is not None}

    @property
    def table(self) -> SparsityTable:
        """Layer x projection, the shape of the paper's Table 5.

        A name is split at its first whole number: `model.layers.3.self_attn.q_proj` is row 3,
        column `q_proj` (as much of the end as tells the columns apart). Experts are averaged.
        """
        return table_of(self.by_module)

    def by_sample(self, modules: Collection[str] | None = None) -> list[float]:
        """Sparsity of each sample, averaged over modules; NaN of one that is padding alone.

        Args:
            modules: over these; None: over all that were called.

        Raises:
            TokenGateError: the recording was without `positions`; a module is unknown, was not
                called, or saw another number of samples than the others.
        """
        found = self._details("by_sample", modules, "positions=True")
        counts = {name: len(shares) for name, shares in found.items()}
        first, *others = counts
        for other in others:
            if counts[other] != counts[first]:
                raise TokenGateError(
                    f"sparsity by sample was asked over {first!r} with {counts[first]} samples and "
                    f"{other!r} with {counts[other]}: pass modules= with as many samples each."
                )
        return [mean(shares) for shares in zip(*found.values(), strict=True)]

    def by_position(self, modules: Collection[str] | None = None) -> list[float]:
        """Share of unmodified positions at each place in the sequence, all samples together.

        The first real position of a sample is at place 0, wherever its padding is.

        Args:
            modules: of these together; None: of all that were called.

        Raises:
            TokenGateError: the recording was without `positions`; a module is unknown or was not
                called.
        """
        found = self._details("by_position", modules, "positions=True")
        by_place = zip_longest(*found.values(), fillvalue=(0, 0))
        sums = [[sum(counts) for counts in zip(*place, strict=True)] for place in by_place]
        return [1 - modified / positions if positions else math.nan for positions, modified in sums]

    def histogram(self, of: str = "r", modules: Collection[str] | None = None) -> Histogram:
        """How often r = ||M(x)|| / ||W0 x|| (eq. 4) or tau is where.

        Args:
            of: "r": of all positions, with four bins to the octave; infinite where no tau closes
                the gate. "tau": of the modules, with bins of one width.
            modules: of these; None: of all that have it.

        Raises:
            TokenGateError: `of` is something else; no module has it: for r, the recording was
                without `ratios`; a module is unknown or does not have it.
        """
        if choice("of", of, ("r", "tau")) == "tau":
            taus = self._details("tau", modules, "a gate")
            return histogram_of(list(taus.values()))
        found = self._details("ratios", modules, "ratios=True")
        return Histogram(RATIO_EDGES, tuple(map(sum, zip(*found.values(), strict=True))))

    def _details(self, of: str, modules: Collection[str] | None, needs: str) -> dict[str, Any]:
        """That attribute of the modules, or of all that have it, by name."""
        known = {n: getattr(m, of) for n, m in self.modules.items() if getattr(m, of) is not None}
        wrong = [name for name in modules or () if name not in known]
        if wrong or not known or (modules is not None and not modules):
            what = f"{wrong[0]!r}" if wrong else "no module" if known else "any module"
            raise TokenGateError(
                f"{of} was asked of {what}, where this report has it of {len(known)} modules: "
                f"pass names of those that were called, recorded with {needs}."
            )
        return {name: found for name, found in known.items() if modules is None or name in modules}

    def merge(self, later: SparsityReport) -> SparsityReport:
        """The report of one recording of both, exactly; the taus are the later's, as is `about`.

        A detail (r, sparsity by sample and by position) that a module has in one of the two alone
        is left out.

        Raises:
            TokenGateError: `later` is no report.
        """
        modules = dict(self.modules)
        for name, module in check_report("merge", later).modules.items():
            modules[name] = modules[name].merged(module) if name in modules else module
        return SparsityReport(modules, dict(later.about or self.about))

    def compare(self, other: SparsityReport) -> ReportDifference:
        """What is different in `other`, by module, the largest change of sparsity first.

        Raises:
            TokenGateError: `other` is no report.
        """
        return report_difference(self.modules, check_report("compare", other).modules)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all; `SparsityReport.load` reads it.

        Raises:
            TokenGateError: `path` is a folder.
            OSError: the file cannot be written.
        """
        write_report(path, self.to_dict(), self.about)

    @classmethod
    def load(cls, path: str | Path) -> SparsityReport:
        """What `save` wrote.

        Raises:
            TokenGateError: the file cannot be read, or holds something else.
        """
        return cls(*read_report(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; None in place of those that are not finite."""
        return {
            **self._averages(),
            "modules": {name: module.to_dict() for name, module in self.modules.items()},
        }

    def _averages(self) -> dict[str, float | None]:
        return {
            "sparsity": value(self.sparsity),
            "std": value(self.std),
            "token_sparsity": value(self.token_sparsity),
        }

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line for each module; an empty field where there is no value.

        Args:
            path: where to write it, too, whole or not at all.

        Raises:
            TokenGateError: `path` is a folder.
            OSError: the file cannot be written.
        """
        text = csv_of(self.modules)
        if path is not None:
            write_text(path, text)
        return text

    def to_frame(self) -> Any:
        """The same as a `pandas.DataFrame`, NaN where there is no value.

        Raises:
            TokenGateError: pandas is not installed.
        """
        return frame_of(self.modules)

    def to_markdown(self) -> str:
        """The layer x projection table in percent, with averages, as Markdown."""
        return markdown_table(*self.table.percents(self.sparsity))

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        texts: Sequence[TokenView] = (),
        images: Sequence[PatchView] = (),
        title: str = "Where the modifications act",
        beside: SparsityReport | None = None,
        names: tuple[str, str] | None = None,
    ) -> str:
        """The report as a page for a browser: one file, which loads nothing from elsewhere.

        It has sparsity and tau of all modules, r and the course over the sequence where they were
        recorded, and every token of `texts` and patch of `images` shaded by the share of modules
        that modified it: of all of them, or of those that are chosen there.

        Args:
            path: where to write it, too.
            texts, images: samples to show, of modules of these reports.
            title: of the page.
            beside: another report, to stand beside this one.
            names: what the two are called then; "this report" and "the other" by default.

        Returns:
            The HTML.

        Raises:
            TokenGateError: a sample has a module that no report has, or is no view of one;
                `beside` is no report; `path` is a folder.
            OSError: the file cannot be written, or an image not be read.
        """
        if beside is None:
            unused("to_html", "without another report beside=", names=names)
        reports = [self] if beside is None else [self, check_report("to_html", beside)]
        called = ("this report", "the other") if names is None else names
        shown = [
            Shown(n, r.modules, r._averages(), r.about)
            for n, r in zip(called, reports, strict=False)
        ]
        page = html_page(title, shown, texts, images)
        if path is not None:
            write_text(path, page)
        return page

    def _repr_html_(self) -> str:
        """For notebooks: the layer x projection table in percent, with averages."""
        table = self.table
        (_, *columns), body = table.percents(self.sparsity)
        # The averages stay without a colour.
        values = [[*row, None] for row in table.values] + [[None] * len(columns)]
        cells = html_table(columns, [row[0] for row in body], values, [row[1:] for row in body])
        return f"<p>sparsity (%)</p>{cells}<p>{escape(self._summary())}</p>"

    def plot(self, path: str | Path | None = None) -> Any:
        """The layer x projection table as a picture, a `matplotlib.figure.Figure`.

        Args:
            path: a file to write it to as well, in the format of its ending (.png, .pdf, .svg).

        Raises:
            TokenGateError: matplotlib is not installed, or has no format of that ending; there is
                no module.
            OSError: the file cannot be written.
        """
        return picture(load_plots().heatmap(self), path)

    def __str__(self) -> str:
        table = text_table(*self.table.percents(self.sparsity))
        return "\n".join(["sparsity (%)", table, self._summary()])

    def _summary(self) -> str:
        return summary(self.modules, self.sparsity, self.std, self.token_sparsity)


def check_report(asked: str, found: Any) -> SparsityReport:
    """`found`, which the function `asked` was given, if it is a report."""
    if not isinstance(found, SparsityReport):
        raise TokenGateError(
            f"{asked} was given {brief(found)}: pass a SparsityReport, as rec.report() returns it "
            "and SparsityReport.load reads it."
        )
    return found
