"""A gate of your own in ten lines: learned positions, the same for every input.

It gates LoRA on a small transformer, which has learned handwritten digits row by row, adapted to
the same digits on their side; and is compared with the paper's gate, the soft one, a random one of
the same share, and no gate, in one table. Nothing is downloaded; two cores need about a minute.

    python examples/custom_gate.py --output outputs/custom_gate
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from custom_method import Reader, accuracy, load_images, train
from torch import Tensor, nn

import tokengate
from tokengate.gates import Positions


@tokengate.register_gate("places")
class Places(tokengate.Gate):
    """a_i = sigmoid(4 c_i) at place i of a sequence, hard in evaluation."""

    def __init__(self, linear: nn.Linear, *, length: int = 8) -> None:
        super().__init__(linear)
        self.c = self.new_parameter(length)

    def weights(self, positions: Positions) -> Tensor:
        c = self.c.expand(positions.shape)
        return torch.sigmoid(4 * c) if self.training else c >= 0


def main() -> None:
    """Pretrain, adapt with every gate, save and load the one of this file, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/custom_gate"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    upright, turned, labels = load_images()
    test, rest = slice(0, 500), slice(500, None)
    base = Reader()
    train(base, [{"params": list(base.parameters()), "lr": 2e-3}], upright[rest], labels[rest], "")

    rows, reports = [], {}
    gates = {"none": False, "threshold": "threshold", "sigmoid": "sigmoid", "places": "places"}
    options = {"threshold": {"penalty": 3e-4}, "sigmoid": {"start": 0.5}}
    for name, gate in {**gates, "random": "random"}.items():
        if name == "random":  # of the share that the gate of this file came to
            options[name] = {"sparsity": min(reports["places"].sparsity, 0.99)}
        torch.manual_seed(arguments.seed)
        model = tokengate.patch(
            copy.deepcopy(base), "all-linear", rank=4, gate=gate,
            gate_options=options.get(name), train=["head"],
        )  # fmt: skip
        groups = tokengate.param_groups(model, lr=5e-3, s=1e-3)
        train(model, groups, turned[rest], labels[rest], name)
        model.eval()
        with tokengate.record(model) as rec:
            after = accuracy(model, turned[test], labels[test])
        reports[name] = rec.report()
        rows.append(f"| {name} | {100 * reports[name].sparsity:.1f} | {after:.1f} |")
        if name == "places":
            tokengate.save(model, arguments.output)
            other = copy.deepcopy(base).eval()
            tokengate.load(other, arguments.output)
            assert torch.equal(other(turned[test]), model(turned[test]))
    print("\n| gate | left alone (%) | accuracy (%) |\n|:--|--:|--:|", *rows, sep="\n")
    print(
        f"\n{reports['places']}\n\n{arguments.output}: saved, and loaded into a new copy the same"
    )


if __name__ == "__main__":
    main()
