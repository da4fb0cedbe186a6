"""A program as a user writes one, with which `mypy --strict` and a strict pyright find no fault."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tokengate
from tokengate.gates.positions import Positions
from tokengate.integrations.hf_peft import import_peft
from tokengate.integrations.language import roles


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., 8) -> (..., 8)`."""
        hidden: Tensor = self.up(x)
        changed: Tensor = self.down(hidden.relu())
        return changed


@tokengate.register_gate("user-program")
class EverySecond(tokengate.Gate):
    """Open at every second position."""

    def weights(self, positions: Positions) -> Tensor:
        """a, of shape `(...)`."""
        return torch.arange(positions.r.numel()).view(positions.r.shape) % 2


def main() -> float:
    """Train one step, and how much stayed as it was."""
    net: Net = tokengate.patch(Net(), ["up"], "dora", rank=2, gate="user-program")
    tokengate.patch(net, ["down"], rank=2)
    optimizer = torch.optim.AdamW(tokengate.param_groups(net, lr=1e-3, total_steps=100))
    with tokengate.record(net) as recorder:
        output: Tensor = net(torch.randn(2, 4, 8))
    torch.autograd.backward(output.sum())
    optimizer.step()
    names: list[str] = [*tokengate.layers(net), import_peft.__name__, roles.__name__]
    assert len(names) == 4
    report: tokengate.SparsityReport = recorder.report()
    sparsity: float = report.sparsity
    return sparsity
