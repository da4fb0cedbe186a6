"""All that only a GPU can show, in one command: tests, then step, decode and memory beside PEFT.

    python examples/benchmarks/on_gpu.py
    python examples/benchmarks/on_gpu.py --minutes 4 --parts tests llama3-8b-rank32-lora
    python examples/benchmarks/on_gpu.py --device cpu --config hidden_size=32 ...   (does it run?)

It is made of parts, the most telling first. Each writes a file of its own as soon as it is done,
and is not done again: started anew, the command goes on where it was. A part that fails writes why,
and the next one starts in a new process; delete its file to have it done again. At the end, and
when the time is over, results.md and a picture of each measure are made of all files there are.

Models have a few layers of the real shape (--layers); what a layer costs does not depend on how
many there are. The package need not be installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from decode import Generation  # noqa: E402
from memory import peak  # noqa: E402
from results import Found, about, bars, table  # noqa: E402
from rounds import in_turns, timed  # noqa: E402
from settings import SHAPES, Setting, parser  # noqa: E402
from variants import GATED, PEFT, UNGATED, models, sparsity, tokens, trainings  # noqa: E402

TESTS = "tests"
TEST_FILE = "tests/kernels/triton/test_on_gpu.py"
# What pytest says of it in its report.
FAILED = ("failure", "error")
STEP, TOKEN, PEAK = "step", "token", "peak"
UNITS = {STEP: "ms", TOKEN: "ms", PEAK: "MiB"}
# Medians of one over another's that are to be reached, by method and measure: at most so much.
TARGETS = [
    ("lora", STEP, GATED, PEFT, 1.00),
    ("dora", STEP, GATED, PEFT, 0.55),
    ("lora", STEP, GATED, UNGATED, 1.03),
    ("dora", STEP, GATED, UNGATED, 1.03),
    ("adalora", STEP, GATED, UNGATED, 1.03),
    ("lora", TOKEN, GATED, PEFT, 1.10),
    ("dora", TOKEN, GATED, PEFT, 0.50),
    ("lora", PEAK, GATED, PEFT, 1.00),
    ("dora", PEAK, GATED, PEFT, 1.00),
    ("adalora", PEAK, GATED, PEFT, 1.00),
]
# Seconds that a part may take after the time is over, in which no other is begun.
GRACE = 90
# What has gone wrong on the device goes on being wrong in this process.
DEVICE_IS_BROKEN = 3


@dataclass(frozen=True)
class Case:
    """One part that measures."""

    shape: str
    rank: int
    method: str
    tokens: int

    def __str__(self) -> str:
        more = "" if self.tokens == 4096 else f"-{self.tokens}"
        return f"{self.shape}-rank{self.rank}-{self.method}{more}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The most telling first."""
    shapes = ["llama3-8b", "llava-1.5-7b"]
    for rank, length in ((32, 4096), (128, 4096), (384, 4096), (32, 8192)):
        for shape in shapes:
            for method in options.methods:
                yield Case(shape, rank, method, length)


def parts(options: argparse.Namespace) -> list[str]:
    """The names of all parts that are asked for, in order."""
    names = [TESTS, *map(str, cases(options))]
    unknown = set(options.parts or ()) - set(names)
    if unknown:
        raise SystemExit(
            f"no part is called {', '.join(sorted(unknown))}; there are:\n" + "\n".join(names)
        )
    return [name for name in names if not options.parts or name in options.parts]


def main() -> None:
    """Do the parts that are not done yet, until the time is over; write what is known."""
    options = options_of(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    if options.work:
        sys.exit(work(options))
    while before := todo(options):
        # A process of its own, after which the device is as before.
        command = [sys.executable, __file__, *sys.argv[1:], "--work", "--until", str(options.until)]
        try:
            code = subprocess.run(command, timeout=options.until - time.time() + GRACE).returncode
        except subprocess.TimeoutExpired:  # a kernel that never ends, say
            for hung in undone(options)[:1]:  # or all were done, and the process did not end
                write(options, hung, {"failed": f"it had not ended {GRACE} seconds after the time"})
            break
        if code == 0:
            break
        if todo(options) == before:  # not even a reason was written
            write(options, before[0], {"failed": f"its process ended with {code}"})
    summarise(options)


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What was asked for."""
    options = parser(__doc__.splitlines()[0], "on_gpu")
    options.set_defaults(device="cuda", dtypes=["bfloat16"], rounds=5, warmup=2, batch=1)
    options.add_argument("--minutes", type=float, default=8, help="after which no part is begun")
    options.add_argument("--layers", type=int, default=4, help="of each model")
    options.add_argument("--tokens", type=int, help="of a step, instead of each part's own")
    options.add_argument("--new", type=int, default=16, help="tokens that are generated")
    options.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    options.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--until", type=float, help=argparse.SUPPRESS)
    found = options.parse_args(arguments)
    found.until = found.until or time.time() + 60 * found.minutes
    if found.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here: pass --device cpu to see whether this runs")
    return found


def todo(options: argparse.Namespace) -> list[str]:
    """The parts that have no file yet, while there is time."""
    return [] if time.time() > options.until else undone(options)


def undone(options: argparse.Namespace) -> list[str]:
    """The parts that have no file yet."""
    return [name for name in parts(options) if not file_of(options, name).exists()]


def file_of(options: argparse.Namespace, name: str) -> Path:
    """Where a part writes what it found."""
    return Path(options.out, f"{name}.json")


def write(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Say what a part found; as a whole or not at all."""
    path = file_of(options, name)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(found, indent=1))
    os.replace(draft, path)
    print(f"{name}: {found.get('failed', 'done')}", flush=True)


def work(options: argparse.Namespace) -> int:
    """Do the parts in this process; not 0 where the next ones want another."""
    torch.set_num_threads(options.threads)
    by_name = {str(case): case for case in cases(options)}
    for name in parts(options):
        if name not in todo(options):
            continue
        begin = time.time()
        try:
            found = tested(options) if name == TESTS else measured(by_name[name], options)
        except Exception as error:
            traceback.print_exc()
            write(options, name, {"failed": f"{type(error).__name__}: {error}"[:1000]})
            return DEVICE_IS_BROKEN
        write(options, name, found | {"seconds": time.time() - begin, **about(options)})
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def tested(options: argparse.Namespace) -> dict[str, Any]:
    """The CUDA tests: how many there were and were skipped, which failed, and how they ended.

    One that fails may leave the device broken for its process: the rest goes on in another.
    """
    end = time.time() + max(60.0, (options.until - time.time()) / 2)  # the other half is to measure
    report = Path(options.out, "tests.xml").resolve()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    # As pyproject.toml has it, but for errors where other versions are installed.
    lenient = ["-W", "default", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", *lenient, TEST_FILE]
    done: dict[str, tuple[str, str]] = {}
    ended = "the time was over"
    while (seconds := end - time.time()) > 0:
        report.unlink(missing_ok=True)
        rest = [f"--deselect={TEST_FILE}::{name}" for name in done] + [f"--junitxml={report}"]
        try:
            ran = subprocess.run([*command, *rest], cwd=ROOT, env=environment, timeout=seconds)
        except subprocess.TimeoutExpired:
            break
        found = outcomes(report)
        done |= found
        if ran.returncode != 1 or not found:  # 5: after one that failed there was none
            all_ran = done and ran.returncode in (0, 5)
            ended = "" if all_ran else f"pytest ended with {ran.returncode}"
            break
    broken = {name: why for name, (outcome, why) in done.items() if outcome in FAILED}
    skipped = sum(outcome == "skipped" for outcome, _ in done.values())
    return {"tests": len(done), "skipped": skipped, "broken": broken, "ended": ended}


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """What became of each test, and why; empty where there is no report."""
    found = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase") if report.exists() else ():
        said = [(each.tag, " ".join(each.get("message", "").split())[:500]) for each in case]
        some = [each for each in said if each[0] in (*FAILED, "skipped")]
        found[case.get("name", "")] = some[0] if some else ("passed", "")
    return found


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Step, peak memory and generated token of one case, of each variant."""
    shape = {**SHAPES[case.shape], "num_hidden_layers": options.layers, **dict(options.config)}
    [dtype] = options.dtypes
    length = (options.tokens or case.tokens) // options.batch
    setting = Setting(
        case.method, dtype, options.dropouts[0], case.rank, shape, options.batch, length,
        options.device, options.seed,
    )  # fmt: skip
    found: dict[str, Any] = {}
    variants = models(setting)
    steps = trainings(variants, setting)
    found[STEP] = timed({name: t.step for name, t in steps.items()}, options, f"{case}, {STEP}")
    once = argparse.Namespace(**{**vars(options), "rounds": 1, "warmup": 0})
    peaks = {name: partial(peak, t.step) for name, t in steps.items()}
    found[PEAK] = in_turns(peaks, once, f"{case}, {PEAK}")
    del steps, peaks
    one = replace(setting, batch=1, length=min(length, 256))
    each = {name: Generation(model, tokens(one), options.new) for name, model in variants.items()}
    for generation in each.values():
        generation.prompt()
    several = timed({name: g.tokens for name, g in each.items()}, options, f"{case}, {TOKEN}")
    found[TOKEN] = {name: [ms / options.new for ms in times] for name, times in several.items()}
    return {"found": found, "sparsity": sparsity(variants[GATED], tokens(one))}


def summarise(options: argparse.Namespace) -> None:
    """results.md and figure.png, of what has been done."""
    names = parts(options)
    done = {
        name: json.loads(file_of(options, name).read_text())
        for name in names
        if file_of(options, name).exists()
    }
    lines = ["# On a GPU", ""]
    told = next((each for each in done.values() if "versions" in each), None)
    if told is not None:
        versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
        what = f"{options.layers} layers of each shape, {options.dtypes[0]}"
        how = f"dropout {options.dropouts[0]:g}, {options.rounds} rounds"
        lines += [f"{told['gpu'] or told['machine']}; {versions}; {what}, {how}.", ""]
    if TESTS in done:
        lines += [_of_tests(done[TESTS]), ""]
    measures = {name: each["found"] for name, each in done.items() if "found" in each}
    lines += ["## What was to be reached", "", *_verdicts(measures), ""]
    for measure, unit in UNITS.items():
        found: Found = {name: each[measure] for name, each in measures.items()}
        if found:
            lines += [f"## {measure}", "", table(found, unit), ""]
            bars(found, unit).savefig(Path(options.out, f"{measure}.png"), dpi=150)
    if measures:
        closed = [f"{name} {done[name]['sparsity']:.2f}" for name in measures]
        lines += ["Share of closed positions: " + "; ".join(closed) + ".", ""]
    lines += [
        f"- {name} failed: {each['failed']}" for name, each in done.items() if "failed" in each
    ]
    left = [name for name in names if name not in done]
    if left:
        lines.append(f"- no time was left for: {'; '.join(left)}")
    text = "\n".join(lines).rstrip() + "\n"
    Path(options.out, "results.md").write_text(text)
    print(text)


def _of_tests(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"CUDA tests: {found['failed']}"
    broken = "".join(f"\n- {name}: {why}" for name, why in found["broken"].items())
    ended = found["ended"] and f"\n- they did not come to their end: {found['ended']}"
    return (
        f"CUDA tests: {found['tests']}, of which {len(found['broken'])} failed and "
        f"{found['skipped']} were skipped.{broken}{ended}"
    )


def _verdicts(measures: dict[str, Found]) -> list[str]:
    lines = ["| part | of | ratio | at most | |", "|:--|:--|--:|--:|:--|"]
    for name, found in measures.items():
        for method, measure, one, other, most in TARGETS:
            times = found.get(measure, {})
            if method not in name.split("-") or not {one, other} <= times.keys():
                continue
            ratio = float(np.median(times[one]) / np.median(times[other]))
            verdict = "reached" if ratio <= most else "missed"
            lines.append(
                f"| {name} | {measure}: {one} / {other} | {ratio:.2f} | {most:.2f} | {verdict} |"
            )
    return lines if len(lines) > 2 else ["Nothing was measured."]


if __name__ == "__main__":
    main()
