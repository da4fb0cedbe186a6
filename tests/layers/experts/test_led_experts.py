"""A schedule's last thresholds, of experts: one of them may be given no position."""

import pytest
import torch
from mixtures import Experts, Mixture

import tokengate


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("given", [4, 3])
def test_settled(per_layer, given):
    def trained(settle):
        torch.manual_seed(0)
        model = Mixture(Experts(4, 6, 5))
        tokengate.patch(model, ["experts.w"], rank=2, experts={"experts.w": "eoi"})
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
        options = {"per_layer": per_layer, "settle": settle}
        schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, 20, **options)
        for _ in range(20):
            optimizer.zero_grad()
            (model(*batch()) - 1).square().mean().backward()
            optimizer.step()
        with torch.no_grad(), tokengate.record(model.eval()) as rec:
            for _ in range(20):
                model(*batch())
        return rec.report().sparsity, schedule.thresholds

    def batch():
        return torch.randn(2, 30, 5), torch.rand(60, given).topk(2, -1).indices

    (_, followed), (share, settled) = trained(False), trained(True)
    assert settled != followed
    assert share == pytest.approx(0.5, abs=0.03)
