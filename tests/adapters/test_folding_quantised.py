"""fold(dequantise=True): merged, a quantised layer is dense; undone, it is what it was."""

import contextlib
import copy

import pytest
import torch
from models import away_from_initialisation
from test_interruptions import Interrupted
from test_quantised import BITSANDBYTES, KINDS, K, configuration, folder, quantised
from torch import nn

import tokengate
from tokengate import Slices, TokenGateError
from tokengate.linears.linear_like import row_blocks
from tokengate.linears.quantised import is_quantised

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the test extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["folder"]  # a fixture

DATA = [torch.randn(4, 6, K, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def patched(kind, method="lora", dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    model = quantised(kind, bias=bias, dtype=dtype).eval()
    tokengate.patch(model, "all-linear", method, rank=3, gate=False)
    return away_from_initialisation(model, 0.3)


def outputs(model, dtype=torch.float32):
    with torch.no_grad():
        return torch.cat([model(x.to(dtype)) for x in DATA]).float()


def stored(model):
    """The bytes of the quantised weight, and what they are read with."""
    layer = model[0]
    weight = layer.weight
    if hasattr(weight, "__tensor_flatten__"):
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    else:
        parts = [weight.data, *(v for v in vars(weight).values() if isinstance(v, torch.Tensor))]
    # As bytes: read as bfloat16 some are NaN, which equals nothing.
    content = [p.reshape(-1).view(torch.uint8).tolist() for p in parts]
    return id(layer), id(weight), type(weight), content


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_dense_and_given_back_bit_for_bit(kind, method, tmp_path):
    model = patched(kind, method)
    before = outputs(model)  # which lets bitsandbytes lay out the weight
    as_it_was, W0 = stored(model), torch.cat(list(row_blocks(model[0]))).float()
    with torch.no_grad():
        M = model[0].modification.factors(torch.eye(K), W0.T, model[0]).product(W0.T)
    base = outputs(tokengate.unpatch(copy.deepcopy(model)))
    assert (before - base).norm() > 0.02 * base.norm()

    with pytest.raises(TokenGateError, match=r"whose weight is quantised .* dequantise=True"):
        tokengate.fold(model, DATA)
    assert stored(model) == as_it_was
    folding = tokengate.fold(model, DATA, dequantise=True)
    assert folding.names("merged") == ["0"]
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    assert not is_quantised(layer)
    assert type(layer.weight) is nn.Parameter
    assert not layer.weight.requires_grad
    difference = outputs(model) - before
    # 8-bit layers of bitsandbytes round their inputs, too; some CPUs multiply 4 bits in bfloat16.
    rounding = 0.03 if kind == "8 bit" else 5e-3 if kind in BITSANDBYTES else 1e-5
    assert difference.norm() < rounding * before.norm()
    measured = (difference.norm() / before.norm()).item()
    assert folding.error == pytest.approx(measured, rel=0.01, abs=1e-9)
    assert folding.layers["0"].error < rounding
    assert kind != "8 bit" or folding.layers["0"].error > 1e-3

    torch.testing.assert_close(layer.weight, W0 + M.T, rtol=0, atol=1e-5)

    dense = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), dense)
    x = torch.randn(2, K, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    with tokengate.disabled(model):
        assert stored(model) == as_it_was
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), dense)

    tokengate.save(model, tmp_path)
    torch.manual_seed(0)
    other = quantised(kind).eval()
    tokengate.load(other, tmp_path)
    torch.testing.assert_close(outputs(other), before, rtol=0, atol=1e-4)

    folding.undo()
    assert stored(model) == as_it_was
    assert torch.equal(outputs(model), before)
    tokengate.fold(model, DATA, dequantise=True)
    tokengate.unpatch(model)
    assert stored(model) == as_it_was
    assert type(model[0]) is type(quantised(kind)[0])
    assert torch.equal(outputs(model), base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_sixteen_bits(kind, bias):
    model = patched(kind, dtype=torch.bfloat16, bias=bias)
    before = outputs(model, torch.bfloat16)
    folding = tokengate.fold(model, [x.bfloat16() for x in DATA], dequantise=True)
    assert folding.names("merged") == ["0"]
    assert model(DATA[0].bfloat16()).dtype == torch.bfloat16
    if "held" not in kind:  # whose compute_dtype is given
        expected = torch.float16 if kind == "8 bit" and not bias else torch.bfloat16
        assert model[0].weight.dtype == expected
    assert (outputs(model, torch.bfloat16) - before).norm() < 0.03 * before.norm()
    assert 0 < folding.error < 0.03


def test_a_report_evaluates_nothing():
    """bitsandbytes lays weights out anew in an evaluation; fold asks a copy what it computes."""
    for kind in ("8 bit", "nf4"):
        model = patched(kind).train()
        with tokengate.record(model) as rec:
            model(DATA[0])
        before = stored(model)
        folding = tokengate.fold(model, rec.report(), dequantise=True)
        assert folding.names("merged") == ["0"]
        assert 0 < folding.layers["0"].error < 0.03
        folding.undo()
        assert stored(model) == before


def test_what_computes_with_other_weights_is_refused(monkeypatch):
    """As bitsandbytes 0.50 does with rows of no whole blocks on some CPUs."""
    model = patched("nf4")
    outputs(model)
    before = stored(model)
    kind = type(model[0])._own_class
    real = kind.forward
    with monkeypatch.context() as patching:
        patching.setattr(kind, "forward", lambda self, x: real(self, x).flip(-1))
        with pytest.raises(TokenGateError, match=r"what it computes now by [01].*safe"):
            tokengate.fold(model, DATA, dequantise=True)
        assert stored(model) == before
        folding = tokengate.fold(model, DATA, dequantise=True, safe=False)
        assert folding.layers["0"].error > 0.1
        folding.undo()
    assert stored(model) == before
    with pytest.raises(TokenGateError, match="dequantise=1 is neither"):
        tokengate.fold(model, DATA, dequantise=1)


def test_interrupted_it_is_quantised_still_or_dense():
    names = {"put", "_write", "_read", "become", "fold_layers", "unfold", "_reattach"}
    for way in ("fold", "undo"):
        for at in range(500):
            model = patched("8 bit")
            folding = None
            outputs(model)
            if way == "undo":
                folding = tokengate.fold(model, DATA, dequantise=True)
            before, held = outputs(model), stored(model)
            with Interrupted(names, at) as interrupted, contextlib.suppress(KeyboardInterrupt):
                folding.undo() if folding else tokengate.fold(model, DATA, dequantise=True)
            if not interrupted.happened:
                break
            assert torch.equal(outputs(model), before)
            assert stored(model) == held
            tokengate.unpatch(model)
            assert type(model[0]) is bitsandbytes.nn.Linear8bitLt
        assert at > 10


def test_slices_of_a_quantised_layer_are_kept_or_dropped():
    torch.manual_seed(0)
    model = quantised("8 bit").eval()
    slices = {"0": Slices(a=8, b=24)}
    tokengate.patch(model, ["0.a", "0.b"], rank=2, slices=slices)
    away_from_initialisation(model)
    model[0].b.gate.tau.data.fill_(1e6)
    before = outputs(model)
    folding = tokengate.fold(model, DATA, dequantise=True)
    assert folding.layers["0.a"].reason.endswith("it is a slice of a quantised layer")
    assert folding.names("dropped") == ["0.b"]
    assert torch.equal(outputs(model), before)


def test_a_model_that_transformers_quantised(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=configuration("8 bit"), dtype=torch.bfloat16
    )
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    tokengate.patch(model.eval(), ["q_proj", "down_proj"], "dora", rank=4)
    base = model(ids).logits
    away_from_initialisation(model, 0.1)
    before = model(ids).logits
    assert (before - base).norm() > 0.05 * base.norm()
    folding = tokengate.fold(model, [{"input_ids": ids}], dequantise=True)
    assert len(folding.names("merged")) == 4
    assert folding.error < 0.05
    tokengate.unpatch(model)
    assert torch.equal(model(ids).logits, base)
