"""AdaLoRA's penalty, by hand."""

import pytest
import torch
from models import Net, away_from_initialisation

import tokengate


def test_orthogonality_by_hand():
    model = tokengate.patch(Net(), ["blocks.0.q_proj"], "adalora", rank=2)
    m = model.blocks[0].q_proj.modification
    with torch.no_grad():
        m.P.zero_()
        m.P[0, 0], m.P[1, 1] = 2.0, 1.0  # P'P - I = diag(3, 0)
        m.Q.zero_()
        m.Q[0, 0] = 1.0
        m.Q[1, 0] = 1.0  # QQ' - I = [[0, 1], [1, 0]]
    penalty = tokengate.orthogonality(model)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx((3 + 2**0.5) / 2)
    penalty.backward()
    assert m.P.grad[0, 0] == pytest.approx(2 * 2.0 / 2)  # d/dp of (p^2 - 1) / 2
    with torch.no_grad():
        m.P.zero_()
        m.P[0, 0] = m.P[1, 1] = 1.0
        m.Q.zero_()
        m.Q[0, 3] = m.Q[1, 5] = 1.0
    model.zero_grad()
    penalty = tokengate.orthogonality(model)
    assert penalty.item() == 0
    penalty.backward()
    assert m.P.grad.isfinite().all()  # a norm has no derivative at 0


def test_orthogonality_within_autocast():
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"], "adalora"))
    expected = tokengate.orthogonality(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = tokengate.orthogonality(model)
    penalty.backward()
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=0)


def test_orthogonality_needs_an_adalora():
    with pytest.raises(tokengate.TokenGateError, match="orthogonality was asked of a Net whose"):
        tokengate.orthogonality(tokengate.patch(Net(), ["q_proj"]))
