"""restrict: outside, a layer is the base to the bit; inside it is as ever."""

import contextvars
import threading

import pytest
import torch
from models import Net, one_sentence
from restricted import MASK, layer_of, net
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokengate

pytestmark = pytest.mark.usefixtures("one_thread")
GATES = ["threshold", False, "sigmoid", "random"]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outside_it_is_the_base_to_the_bit_and_inside_as_without(method, gate, dtype):
    layer, x = layer_of(method, gate, dtype), torch.randn(2, 5, 6).to(dtype)
    with tokengate.disabled(layer):
        base = layer(x)
    free = layer(x)
    with tokengate.restrict(layer, MASK):
        h = layer(x)
    assert torch.equal(h[~MASK], base[~MASK])
    assert torch.equal(h[MASK], free[MASK])
    assert not torch.equal(free, base)
    assert gate == "random" or not torch.equal(h, free)
    assert gate == "random" or not torch.equal(h, base)
    assert torch.equal(layer(x), free)


def test_outside_is_the_base_even_with_a_broken_adapter():
    layer, x = layer_of(), torch.randn(2, 5, 6)
    with tokengate.disabled(layer):
        base = layer(x)
    with torch.no_grad():
        layer.modification.B[0, 0] = float("nan")
    with tokengate.restrict(layer, MASK):
        h = layer(x)
    assert torch.equal(h[~MASK], base[~MASK])
    assert h[MASK].isnan().any()


@pytest.mark.parametrize("gate", ["threshold", "sigmoid", False])
def test_training_counts_what_is_inside_alone(gate):
    """tau, lambda and gradients are those of the inside positions run by themselves."""
    options = {} if gate is False else {"penalty": 0.3}
    layer, x = net(gate, targets=["head"], **options).head, torch.randn(2, 5, 8)
    if gate == "threshold":
        tokengate.calibrate(layer, [(x,)], sparsity=0.5)
    grad = torch.randn(2, 5, 3)
    found = []
    for rows, where in ((x, MASK), (x[MASK][:, None], None)):
        layer.zero_grad()
        if where is None:
            layer(rows).backward(grad[MASK][:, None])
        else:
            with tokengate.restrict(layer, where), tokengate.record(layer) as rec:
                layer(rows).backward(grad)
            assert rec.report().modules[""].positions == MASK.sum()
        found.append({n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6)
    layer.zero_grad()
    layer(x).backward(grad)
    assert any(
        (p.grad - found[0][n]).abs().max() > 1e-3
        for n, p in layer.named_parameters()
        if p.grad is not None
    )


def test_weights_scale_what_is_added():
    layer, x = layer_of(gate=False), torch.randn(2, 5, 6)
    weights = torch.rand(2, 5)
    weights[0, 0] = 0
    with tokengate.disabled(layer):
        base = layer(x)
    with tokengate.restrict(layer, weights):
        h = layer(x)
    torch.testing.assert_close(h, base + weights[..., None] * (layer(x) - base))
    assert torch.equal(h[0, 0], base[0, 0])


def test_contexts_nest_by_product_and_end_in_any_order():
    layer, x = layer_of(), torch.randn(2, 5, 6)
    other = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    with tokengate.restrict(layer, MASK & other):
        wanted = layer(x)
    one, two = tokengate.restrict(layer, MASK), tokengate.restrict(layer, other)
    one.__enter__()
    two.__enter__()
    assert torch.equal(layer(x), wanted)
    one.__exit__(None, None, None)
    with tokengate.restrict(layer, other):
        alone = layer(x)
    assert torch.equal(layer(x), alone)
    two.__exit__(None, None, None)
    assert not torch.equal(layer(x), alone)


def test_other_threads_run_as_they_did():
    layer, x = layer_of(), torch.randn(2, 5, 6)
    free, found = layer(x), []
    with tokengate.restrict(layer, MASK):
        here = layer(x)
        thread = threading.Thread(target=lambda: found.append(layer(x)))
        thread.start()
        thread.join()
        contextvars.Context().run(lambda: found.append(layer(x)))
    assert not torch.equal(here, free)
    assert all(torch.equal(each, free) for each in found)
    assert "restrict" not in " ".join(vars(layer))


def test_a_call_without_positions():
    layer = layer_of()
    with tokengate.restrict(layer, MASK):
        assert layer(torch.randn(0, 6)).shape == (0, 5)
        assert layer(torch.randn(0, 5, 6)).shape == (0, 5, 5)


def test_patterns_and_functions_choose_layers():
    model, x = net(), torch.randn(2, 5, 8)
    with tokengate.restrict(model, {"*.q_proj": MASK}), tokengate.record(model) as rec:
        model(x)
    positions = {name: m.positions for name, m in rec.report().modules.items()}
    assert set(positions.values()) == {10, MASK.sum().item()}
    assert positions["blocks.1.q_proj"] == MASK.sum()
    asked = []

    def where(name, shape):
        asked.append((name, tuple(shape)))
        return False if name.endswith("fc1") else MASK

    with tokengate.restrict(model, where), tokengate.record(model) as rec:
        model(x)
    assert asked == [(name, (2, 5)) for name in tokengate.layers(model)]
    assert rec.report().modules["blocks.0.fc1"].positions == 0


def test_rows_of_several_adapters_are_restricted_too(tmp_path):
    model, x = net(), torch.randn(2, 5, 8)
    tokengate.save(model, tmp_path)
    tokengate.load(model, tmp_path, name="other")
    with tokengate.restrict(model, MASK):
        one = model(x)
        with tokengate.use(model, ["other", "default"]):
            torch.testing.assert_close(model(x), one)
    assert (one - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_is_restricted_again(reentrant, training):
    model, x = net().train(training), torch.randn(2, 5, 8, requires_grad=True)
    grads = []
    for again in (False, True):
        model.zero_grad()
        with tokengate.restrict(model, MASK):
            h = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        h.square().sum().backward()  # outside of the context
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    model(x).square().sum().backward()
    free = [p.grad for p in model.parameters() if p.grad is not None]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(grads[0], free, strict=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_graphs_are_of_what_was_in_force():
    torch.compiler.reset()
    layer, x = layer_of(gate=False), torch.randn(2, 5, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    free = compiled(x)
    torch.testing.assert_close(free, layer(x))
    with tokengate.restrict(layer, MASK):
        wanted = layer(x)
        found = compiled(x)
    torch.testing.assert_close(found, wanted)
    assert (found - free).abs().max() > 1e-2
    torch.testing.assert_close(compiled(x), free)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (3, ["restrict was given 3"]),
        (torch.tensor(True), ["a single number"]),
        (torch.full((2, 5), 1.5), ["outside [0, 1]"]),
        (torch.full((2, 5), float("nan")), ["outside [0, 1]"]),
        ({"*.o_proj": MASK}, ["'*.o_proj'", "matches no patched layer"]),
        ({"*": "all"}, ["restrict was given 'all'"]),
        (None, ["restrict was given None"]),
    ],
)
def test_what_is_no_region_is_refused(where, words):
    with one_sentence(*words):
        tokengate.restrict(net(), where)


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (3, 5), (2, 5, 1)])
def test_a_mask_that_fits_no_call_is_an_error_with_both_shapes(shape):
    model, x = net(), torch.randn(2, 5, 8)
    mask = torch.ones(shape, dtype=torch.bool)
    with tokengate.restrict(model, mask), one_sentence(str(shape), "(2, 5)", "blocks.0.q_proj"):
        model(x)


def test_other_refusals(tmp_path):
    with one_sentence("without a patched layer"):
        tokengate.restrict(Net(), MASK)
    model, x = net(), torch.randn(2, 5, 8)
    with tokengate.restrict(model, tokengate.after([1])), one_sentence("input_ids", "q_proj"):
        model(x)
    with tokengate.restrict(model, lambda name, shape: 3), one_sentence("returned 3", "(2, 5)"):
        model(x)
    tokengate.fold(model, [x])
    with one_sentence("that is folded"):
        tokengate.restrict(model, MASK)


def test_equal_inputs_under_two_restrictions_are_computed_again_apart():
    layer, x = layer_of().train(), torch.randn(2, 5, 6, requires_grad=True)
    grads = []
    for again in (False, True):
        layer.zero_grad()
        parts = []
        for where in (MASK, ~MASK):
            with tokengate.restrict(layer, where):
                parts.append(checkpoint(layer, x, use_reentrant=False) if again else layer(x))
        (parts[0].square().sum() + 3 * parts[1].sum()).backward()
        grads.append(layer.modification.B.grad.clone())
    torch.testing.assert_close(*grads)


def test_copies_side_by_side_are_no_beams_and_an_expert_sees_other_positions():
    model, x = net(), torch.randn(2, 5, 8)
    with tokengate.restrict(model, MASK), one_sentence("(2, 5)", "(4, 5)"):
        model(torch.cat([x, x]))
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])})
    tokengate.patch(experts, "all-linear")
    with one_sentence("'experts.0', an expert"):
        tokengate.restrict(experts, MASK)
    with tokengate.restrict(experts, lambda name, shape: True):
        pass
