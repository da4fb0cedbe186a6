"""One long prompt, several adapters: the prompt is computed once, by the base, for all of them.

With everything before a position outside (`tokengate.restrict`), a modified layer is the base there
bit for bit, and so are the keys and values it leaves in the cache. So the cache of a shared prefix
serves every adapter that acts on what comes after it. A small LLaMA with random weights; nothing is
downloaded.

    python examples/shared_prefix.py --prefix 768 --adapters 4
"""

from __future__ import annotations

import argparse
import copy
import inspect
import tempfile
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokengate

# transformers 5.24 renamed the one to the other.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(LlamaForCausalLM.forward).parameters
)


def make_model(width: int, adapters: int) -> nn.Module:
    """A patched model with so many adapters, none of which is the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokengate.patch(model, ["q_proj", "k_proj", "v_proj", "down_proj"], rank=8, gate=False)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(adapters):
            for layer in tokengate.layers(model).values():
                for parameter in layer.modification.parameters():
                    nn.init.normal_(parameter, std=0.1)
            tokengate.save(model, folder)
            tokengate.load(model, folder, name=f"adapter {i}")
            tokengate.use(model, "default")
    return model


@torch.no_grad()
def alone(model: nn.Module, names: list[str], ids: Tensor, at: int) -> dict[str, Tensor]:
    """What each adapter says after the suffix, computed from the first token on."""
    inside = (torch.arange(ids.shape[1]) >= at)[None]
    found = {}
    for name in names:
        with tokengate.use(model, name), tokengate.restrict(model, inside):
            found[name] = model(ids).logits[:, at:]
    return found


@torch.no_grad()
def shared(model: nn.Module, names: list[str], ids: Tensor, at: int) -> dict[str, Tensor]:
    """The same, from one cache of the prefix."""
    inside = (torch.arange(ids.shape[1]) >= at)[None]
    with tokengate.disabled(model):
        prefix = getattr(model(ids[:, :at], use_cache=True), "past_key_values")  # noqa: B009
    found = {}
    for name in names:
        with tokengate.use(model, name), tokengate.restrict(model, inside):
            found[name] = model(ids[:, at:], **{CACHE: copy.deepcopy(prefix)}).logits
    return found


def main() -> None:
    """Time both ways, and compare what they say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=int, default=768, help="tokens that all share")
    parser.add_argument("--suffix", type=int, default=32, help="tokens that adapters act on")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    model = make_model(given.width, given.adapters)
    names = [f"adapter {i}" for i in range(given.adapters)]
    ids = torch.randint(512, (1, given.prefix + given.suffix))
    times: dict[str, list[float]] = {"each alone": [], "shared prefix": []}
    for _ in range(given.rounds):
        for name, way in (("each alone", alone), ("shared prefix", shared)):
            start = time.perf_counter()
            found = way(model, names, ids, given.prefix)
            times[name].append(time.perf_counter() - start)
            if name == "each alone":
                wanted = found
    furthest = max((found[name] - wanted[name]).abs().max().item() for name in names)
    apart = (wanted[names[0]] - wanted[names[-1]]).abs().max().item()
    print(
        f"{given.adapters} adapters, {given.prefix} + {given.suffix} tokens, median (min, max) ms"
    )
    for name, seconds in times.items():
        middle, *ends = (1000 * t for t in (sorted(seconds)[len(seconds) // 2], *sorted(seconds)))
        print(f"{name:14} {middle:7.1f} ({ends[0]:.1f}, {ends[-1]:.1f})")
    print(f"logits differ by {furthest:.2g} between the two ways, by {apart:.2g} between adapters")


if __name__ == "__main__":
    main()
