"""What generating costs: a prompt, and each token after it, against PEFT and the frozen base.

In evaluation mode without gradients, the tokens one by one with a cache of keys and values.

    python examples/benchmarks/decode.py
    python examples/benchmarks/decode.py --device cuda --shape llama3-8b --dtypes bfloat16
"""

from __future__ import annotations

import inspect

import torch
from comparison import compare
from results import Found
from rounds import timed
from settings import Setting, parser
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from variants import tokens

# transformers 5 has renamed it.
names = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in names else "past_key_values"


class Generation:
    """One model's prompt, and `new` tokens after it."""

    def __init__(self, model: nn.Module, ids: Tensor, new: int) -> None:
        self.model, self.ids, self.new = model.eval(), ids, new

    def prompt(self) -> None:
        self.cache = DynamicCache()
        self._read(self.ids)

    def tokens(self) -> None:
        for i in range(self.new):
            self._read(self.ids[:, i : i + 1])
        self.cache.crop(-self.new)  # for the next round

    @torch.no_grad()
    def _read(self, ids: Tensor) -> None:
        self.model(input_ids=ids, **{CACHE: self.cache})


def main() -> None:
    """Time every setting."""
    options = parser(__doc__.splitlines()[0], "decode")
    options.add_argument("--new", type=int, default=16, help="tokens after the prompt")
    options = options.parse_args()

    def measure(variants: dict[str, nn.Module], setting: Setting) -> Found:
        ids = tokens(setting)
        each = {name: Generation(model, ids, options.new) for name, model in variants.items()}
        prompt, token = f"{setting}, prompt", f"{setting}, token"
        prompts = timed({name: g.prompt for name, g in each.items()}, options, prompt)
        several = timed({name: g.tokens for name, g in each.items()}, options, token)
        one = {name: [ms / options.new for ms in times] for name, times in several.items()}
        return {prompt: prompts, token: one}

    compare(options, measure, "ms")


if __name__ == "__main__":
    main()
