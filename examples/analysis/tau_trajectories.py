"""How tau moves with and without Adam, the shape of the paper's Figure 9.

The quickstart's vision transformer is adapted three times from the same start: with Adam on tau
(eq. 18-22), and with eq. 16 alone, tau <- tau + alpha s g, at two sizes of its step. Nothing is
downloaded; one thread needs two minutes.

    python examples/analysis/tau_trajectories.py --output outputs/tau_trajectories
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import tokengate
from tokengate.errors import OtherRuleWarning
from tokengate.integrations import plots

# The quickstart's model lies in the folder above.
sys.path.append(str(Path(__file__).parents[1]))

from quickstart import LEARNING_RATE, TARGETS, Split, load_images, pretrain

EVERY = 5  # steps are logged


def adapt(
    base: nn.Module, data: Split, args: argparse.Namespace, alpha: float | None
) -> tokengate.History:
    """Train a copy of `base`; tau by eq. 16 with this alpha, or by Adam."""
    torch.manual_seed(args.seed)
    model = copy.deepcopy(base)
    model.reset_classifier(10)
    tokengate.patch(model, TARGETS, rank=8, penalty=args.penalty, train=["head"])
    *others, taus = tokengate.param_groups(model, lr=LEARNING_RATE, s=args.s)
    optimizers = [torch.optim.AdamW(others)]
    if alpha is None:
        optimizers += [tokengate.TauAdam(taus["params"], s=args.s)]
    else:
        warnings.simplefilter("ignore", OtherRuleWarning)  # which is what is shown here
        optimizers += [torch.optim.SGD(taus["params"], lr=alpha * args.s)]
    history = tokengate.History(model)
    images, labels = data
    model.train()
    for step in tqdm(range(args.steps), desc="Adam" if alpha is None else f"alpha {alpha:g}"):
        batch = torch.randint(len(labels), (64,))
        with tokengate.record(model) as rec:
            loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % EVERY == 0:
            history.log(step, loss=loss, report=rec.report())
    return history


def main() -> None:
    """Train in all ways, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.0, 30.0], help="of eq. 16")
    parser.add_argument("--lambda", dest="penalty", type=float, default=1e-5, help="pull to close")
    parser.add_argument("--s", type=float, default=2e-3, help="step size of tau (default: 2e-3)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/tau_trajectories"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    base = pretrain(load_images(shifted=False)[0])
    data, _ = load_images(shifted=True)
    histories = {"with Adam": adapt(base, data, args, None)}
    for alpha in args.alpha:
        histories[f"without, alpha = {alpha:g}"] = adapt(base, data, args, alpha)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, history in histories.items():
        history.save(args.output / f"{name.replace(' ', '_')}.json")
    plots.trajectories(histories).savefig(args.output / "trajectories.png", dpi=90)
    print(f"trajectories.png and the histories are in {args.output}")


if __name__ == "__main__":
    main()
