"""What a training step costs: forward, backward and optimiser, against PEFT and the frozen base.

All take their steps in turns, in one process, and start from the same values.

    python examples/benchmarks/step.py
    python examples/benchmarks/step.py --full
    python examples/benchmarks/step.py --device cuda --shape llama3-8b --dtypes bfloat16
"""

from __future__ import annotations

from results import report
from rounds import timed
from settings import parser, settings
from variants import GATED, models, sparsity, tokens, trainings


def main() -> None:
    """Time every setting."""
    options = parser(__doc__.splitlines()[0], "step")
    options.add_argument(
        "--full", action="store_true", help="with and without dropout, all of PEFT"
    )
    options = options.parse_args()
    if options.full:
        options.dropouts, options.same_dtype = [0.05, 0.0], True
    found, closed = {}, {}
    for setting in settings(options):
        variants = models(setting, options.same_dtype)
        steps = {name: t.step for name, t in trainings(variants, setting).items()}
        seconds = timed(steps, options.rounds, options.warmup, options.seed, str(setting))
        found[str(setting)] = {n: [1e3 * s for s in times] for n, times in seconds.items()}
        closed[str(setting)] = sparsity(variants[GATED], tokens(setting))
    report(found, "ms", options, sparsity=closed)


if __name__ == "__main__":
    main()
