"""What the survey found: a line of JSON for each architecture, and tables in docs/ of all."""

from __future__ import annotations

import json
import pathlib
import sys
from collections import Counter
from dataclasses import asdict, dataclass

ROOT = pathlib.Path(__file__).parents[2]
TABLE, PAGE = ROOT / "docs" / "survey.md", ROOT / "docs" / "models.md"
BEGIN = "<!-- the counts, from `python tests/survey/survey_transformers.py --write` -->\n"
END = "<!-- end -->\n"


@dataclass
class Found:
    """What was found of one model type.

    Attributes:
        outcome: "reached": every patched layer was called, trained, and given back; "partly": some
            were never called with this input, and a warning said which; "refused", with the
            sentence; "failed"; or "unbuilt": the base itself could not be built or run.
        layers: how many were patched.
        called: how many of these were called.
        experts: of those held together in 3-D parameters, the same outcomes; "" where none are.
        reason: the sentence, the warning or the error.
    """

    model_type: str
    kind: str = ""
    outcome: str = "unbuilt"
    layers: int = 0
    called: int = 0
    experts: str = ""
    reason: str = ""


def read(path: pathlib.Path) -> dict[str, Found]:
    """What was found before, by model type."""
    lines = path.read_text().splitlines() if path.exists() else []
    each = [Found(**json.loads(line)) for line in lines]
    return {found.model_type: found for found in each}


def written() -> dict[str, Found]:
    """What docs/survey.md has, by model type."""
    found = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 7 and cells[2].isdecimal():
            model_type, kind, layers, called, outcome, experts, reason = cells
            own = (model_type, kind, outcome, int(layers), int(called), experts, reason)
            found[model_type] = Found(*own)
    return found


def keep(path: pathlib.Path, results: dict[str, Found]) -> None:
    """Write what was found so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(found)) + "\n" for found in results.values()))


def table(results: dict[str, Found]) -> str:
    """The counts, and a row for each architecture."""
    lines = [
        "# Survey of transformers",
        "",
        "Written by `python tests/survey/survey_transformers.py --write`.",
        "",
        counts(results),
        "",
        "| model type | class | layers | called | all-linear | experts | what was said |",
        "|---|---|--:|--:|---|---|---|",
    ]
    for found in sorted(results.values(), key=lambda each: each.model_type):
        reason = " ".join(found.reason.split()).replace("|", "/").replace("<", "&lt;")
        reason = reason if len(reason) < 160 else reason[:157] + "..."
        cells = (found.model_type, found.kind, found.layers, found.called, found.outcome)
        lines.append(f"| {' | '.join(map(str, cells))} | {found.experts} | {reason} |")
    return "\n".join(lines) + "\n"


def counts(results: dict[str, Found]) -> str:
    """One paragraph."""
    outcomes = Counter(found.outcome for found in results.values())
    experts = Counter(found.experts for found in results.values() if found.experts)
    unbuilt = outcomes.pop("unbuilt", 0)
    layers = sum(found.called for found in results.values())
    return (
        f"Of {len(results)} model types {sum(outcomes.values())} could be built small and run; "
        f"{unbuilt} could not, for reasons of their own (a library that is missing, inputs that "
        "nothing tells, fields that do not fit when they are made small). "
        f'`"all-linear"`: {counted(outcomes)}; {layers} layers were called. '
        f"Experts in 3-D parameters, in {sum(experts.values())} of them: {counted(experts)}."
    )


def counted(outcomes: Counter[str]) -> str:
    order = ("reached", "partly", "refused", "failed")
    return ", ".join(f"{outcomes[each]} {each}" for each in order)


def write(results: dict[str, Found]) -> None:
    """docs/survey.md, and the counts in docs/models.md."""
    TABLE.write_text(table(results))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    if not rest:
        sys.exit(f"{PAGE} has no line {BEGIN.strip()!r}: put one where the counts belong.")
    PAGE.write_text(f"{before}{BEGIN}\n{counts(results)}\n\n{END}{rest.partition(END)[2]}")
