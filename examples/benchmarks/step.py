"""What a training step costs: forward, backward and optimiser, against PEFT and the frozen base.

All take their steps in turns, in one process, and start from the same values.

    python examples/benchmarks/step.py
    python examples/benchmarks/step.py --full
    python examples/benchmarks/step.py --compile
    python examples/benchmarks/step.py --device cuda --shape llama3-8b --dtypes bfloat16
"""

from __future__ import annotations

import torch
from comparison import compare
from results import Found
from rounds import timed
from settings import Setting, parser
from torch import nn
from variants import trainings


def main() -> None:
    """Time every setting."""
    options = parser(__doc__.splitlines()[0], "step")
    options.add_argument(
        "--full", action="store_true", help="with and without dropout, all of PEFT"
    )
    options.add_argument(
        "--compile", action="store_true", help="all with torch.compile, in the first round"
    )
    options = options.parse_args()
    if options.full:
        options.dropouts, options.same_dtype = [0.05, 0.0], True

    def measure(variants: dict[str, nn.Module], setting: Setting) -> Found:
        if options.compile:
            torch.compiler.reset()
            # Beyond a few models of one class it would run them as they are, without a word. PEFT's
            # DoRA needs many pieces.
            torch._dynamo.config.recompile_limit = 200
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            for model in variants.values():
                model.compile()
        steps = {name: t.step for name, t in trainings(variants, setting).items()}
        return {str(setting): timed(steps, options, str(setting))}

    compare(options, measure, "ms")


if __name__ == "__main__":
    main()
