"""Experts in 3-D parameters equal a plain loop over experts and tokens, whichever way they run."""

import numpy as np
import pytest
import reference
import torch
from drawing import many
from expert_methods import METHODS, modify
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import Experts, Mixture

import tokengate

WAYS = ("linear", "matmul", "in_order", "batched", "grouped")


@st.composite
def cases(draw):
    experts, top = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    top = min(top, experts)
    return {
        "experts": experts,
        "top": top,
        "shown": draw(st.integers(top, experts)),  # the others get no token
        "some": draw(st.none() | st.sets(st.integers(0, experts - 1), min_size=1)),
        "samples": draw(st.integers(1, 2)),
        "length": draw(st.integers(1, 4)),
        "inputs": draw(st.integers(1, 4)),
        "outputs": draw(st.integers(1, 4)),
        "rank": draw(st.integers(1, 3)),
        "axes": draw(st.sampled_from(["eoi", "eio"])),
        "bias": draw(st.booleans()),
        "way": draw(st.sampled_from(WAYS)),
        "method": draw(st.sampled_from(list(METHODS))),
        "gate": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def trained(model, generator):
    """Modifications away from their first values, each expert with a tau of its own."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            more = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.data += more.abs() if name.endswith("tau") else 0.5 * more


@settings(max_examples=many(80))
@given(cases())
@pytest.mark.filterwarnings("ignore::tokengate.errors.RankWarning")  # of drawn sizes
def test_equal_to_a_loop_over_experts_and_tokens(case):
    generator = torch.Generator().manual_seed(case["seed"])
    torch.manual_seed(case["seed"])
    sizes = (case["experts"], case["outputs"], case["inputs"])
    own = Experts(*sizes, case["axes"], case["bias"], case["way"]).double()
    W = (own.w if case["axes"] == "eoi" else own.w.mT).detach().numpy().copy()
    b = None if own.b is None else own.b.detach().numpy().copy()
    method, options = case["method"], METHODS[case["method"]]
    some = sorted(case["some"] or range(case["experts"]))
    model = tokengate.patch(
        Mixture(own),
        ["experts.w"] if case["some"] is None else [f"experts.{e}.w" for e in some],
        method="diagonal of an expert" if method == "diagonal" else method,
        rank=case["rank"],
        scale=0.5,
        gate="threshold" if case["gate"] else False,
        penalty=0.3 if case["gate"] else None,
        experts={"experts.w": case["axes"]},
        **options,
    )
    trained(model, generator)
    (layer,) = tokengate.layers(model).values()
    shape = (case["samples"], case["length"])
    x = torch.randn(*shape, case["inputs"], dtype=torch.double, generator=generator)
    x.requires_grad_()
    scores = torch.rand(x[..., 0].numel(), case["shown"], generator=generator)
    index = scores.topk(case["top"], -1).indices
    mask = torch.rand(shape, generator=generator) < 0.7 if case["masked"] else None
    with tokengate.record(model) as rec:
        h = model(x, index, attention_mask=mask)
    grad = torch.randn(h.shape, dtype=torch.double, generator=generator)
    h.backward(grad)

    def of_all(tensor):
        values = np.zeros((case["experts"], *tensor.shape[1:]))
        values[some] = tensor.detach().numpy()
        return values

    parameters = {n: of_all(p) for n, p in layer.modification.named_parameters()}
    taus = of_all(layer.gate.tau) if case["gate"] else None
    real = None if mask is None else mask.flatten().numpy()
    wanted = reference.experts(
        x.detach().flatten(0, 1).numpy(),
        index.numpy(),
        W,
        b,
        parameters,
        modify(method, options, parameters, W, some),
        taus,
        0.3,
        grad.numpy(),
        real,
    )
    close = {"atol": 1e-10, "rtol": 1e-10}
    np.testing.assert_allclose(h.detach().numpy(), wanted["h"], **close)
    np.testing.assert_allclose(x.grad.flatten(0, 1).numpy(), wanted["x"], **close)
    for name, p in layer.modification.named_parameters():
        np.testing.assert_allclose(p.grad.numpy(), wanted[name][some], **close, err_msg=name)
    if case["gate"]:
        np.testing.assert_allclose(layer.gate.tau.grad.numpy(), wanted["tau"][some], **close)
        assert layer.gate.tau.shape == (len(some),)
    kept = np.ones(shape, dtype=bool).ravel() if real is None else real
    assert list(rec.report().modules) == [f"experts.{e}.w" for e in some]
    for e in some:
        hits = (index.numpy() == e) & kept[:, None]
        found = rec.report().modules[f"experts.{e}.w"]
        assert found.positions == hits.sum()
        assert found.modified == (hits & wanted["S"]).sum()


@pytest.mark.parametrize("way", WAYS)
def test_untrained_is_the_base_to_the_bit_and_unpatched_it_is_again(way):
    own = Experts(4, 6, 5, way=way)
    model, x = Mixture(own), torch.randn(2, 3, 5)
    index = torch.rand(6, 4).topk(2, -1).indices
    before, keys = model(x, index), list(model.state_dict())
    for method in ("lora", "dora", "adalora", "adapter"):
        tokengate.patch(model, ["w"], method=method, rank=2, experts={"w": "eoi"})
        assert torch.equal(model(x, index), before)
        assert [k for k in model.state_dict() if "projections" not in k] == keys
        trained(model, torch.Generator().manual_seed(0))
        assert not torch.equal(model(x, index), before)
        with tokengate.disabled(model):
            assert torch.equal(model(x, index), before)
        tokengate.unpatch(model)
        assert type(own) is Experts
        assert torch.equal(model(x, index), before)
        assert list(model.state_dict()) == keys
