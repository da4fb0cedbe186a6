"""Quantised bases: bitsandbytes' 8- and 4-bit layers and torchao's weights, under every method."""

import copy
import functools
import pickle

import numpy as np
import pytest
import reference
import torch
from allocations import peak_allocation
from models import away_from_initialisation
from torch import nn

import tokengate
from tokengate.errors import UnreachedLayerWarning
from tokengate.linears import linear_like
from tokengate.linears.quantised import is_quantised

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the test extra is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="the test extra is not installed")
from bitsandbytes import functional  # noqa: E402

METHODS = ["lora", "dora", "adalora", "adapter"]


# bitsandbytes brings threads of its own, which would wait for PyTorch's and they for them.
pytestmark = pytest.mark.usefixtures("one_thread")


def four_bit(k, d, bias, **options):
    return bitsandbytes.nn.Linear4bit(k, d, bias=bias, **options)


def eight_bit(k, d, bias):
    return bitsandbytes.nn.Linear8bitLt(k, d, bias=bias, has_fp16_weights=False)


BITSANDBYTES = {
    "8 bit": eight_bit,
    "nf4": functools.partial(four_bit, quant_type="nf4", compress_statistics=False),
    "nf4, nested": functools.partial(four_bit, quant_type="nf4", compress_statistics=True),
    "fp4": functools.partial(four_bit, quant_type="fp4", compress_statistics=False),
    "fp4, nested": functools.partial(four_bit, quant_type="fp4", compress_statistics=True),
    "nf4 held as bf16": functools.partial(
        four_bit, quant_type="nf4", quant_storage=torch.bfloat16, compute_dtype=torch.float32
    ),
}
TORCHAO = {
    "int8": torchao.Int8WeightOnlyConfig,
    "int8, groups": lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(16)),
    "int4": lambda: torchao.IntxWeightOnlyConfig(torch.int4, granularity=torchao.PerGroup(16)),
    "float8": torchao.Float8WeightOnlyConfig,
}
KINDS = [*BITSANDBYTES, *TORCHAO]


# Rows of whole quantisation blocks, in groups of 32: on CPUs with AVX512, bitsandbytes 0.50 itself
# computes with other weights for other rows, and evaluates no other number of them.
K, D = 64, 32


def quantised(kind, k=K, d=D, bias=True, dtype=torch.float32):
    """A model of one quantised layer."""
    plain = nn.Linear(k, d, bias=bias).to(dtype)
    if kind in TORCHAO:
        model = nn.Sequential(plain)
        torchao.quantize_(model, TORCHAO[kind]())
        return model
    layer = BITSANDBYTES[kind](k, d, bias).to(dtype)
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer.to("cpu"))  # which quantises it


def dequantised(layer):
    """All of W0, `(out_features, in_features)`, by the library's own means."""
    weight = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        state = copy.copy(weight.quant_state)
        # As one row: on CPUs with AVX512, bitsandbytes 0.50 misreads rows of no whole blocks.
        state.shape = torch.Size((1, state.shape.numel()))
        return functional.dequantize_4bit(weight.data, state).reshape(weight.quant_state.shape)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales)
    return weight.dequantize()


def expect(layer, x, grad, tau):
    """The reference's answer for a layer whose weight is the dequantised one."""
    m = layer.modification
    own = {n: p.detach().double().numpy() for n, p in m.named_parameters()}
    W0 = dequantised(layer).double().numpy()
    name = type(m).__name__.lower()
    further = {"dora": {"W0": W0}, "adapter": {"activation": "relu"}}.get(name, {})
    modify = functools.partial(getattr(reference, name), p=own, scale=m.scale, **further)
    x, grad = (t.detach().double().numpy() for t in (x, grad))
    bias = layer.bias.detach().double().numpy()
    return reference.layer(x, W0, bias, own, modify, tau, 0.01, grad)


def between(wanted, bias):
    """A threshold that closes about half of the positions, none of them by a hair."""
    m = np.linalg.norm(wanted["m"], axis=1)
    w = np.linalg.norm(wanted["h"] - wanted["m"] - bias.detach().double().numpy(), axis=1)
    ratios = np.sort(m / w)[2:-2]
    below = int((ratios[1:] / ratios[:-1]).argmax())
    assert ratios[below + 1] / ratios[below] > 1.002
    return float(ratios[below : below + 2].mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [True, False], ids=["gated", "ungated"])
def test_it_is_the_layer_of_its_dequantised_weight(kind, method, gate):
    layer = quantised(kind)[0]
    tokengate.patch(layer, "all-linear", method, rank=3, gate=gate, penalty=0.01)
    away_from_initialisation(layer, 0.3)
    if method == "dora":
        with torch.no_grad():
            layer.modification.magnitude.add_(dequantised(layer).float().norm(dim=1))
    x = torch.randn(12, K, requires_grad=True)
    grad = torch.randn(12, D)
    wanted = expect(layer, x, grad, None)
    if gate:
        tau = between(wanted, layer.bias)
        with torch.no_grad():
            layer.gate.tau.fill_(tau)
        wanted = expect(layer, x, grad, layer.gate.tau.item())
        assert 0 < sum(wanted["S"]) < 12

    # In evaluation, bitsandbytes' 8-bit layer rounds its input too.
    with tokengate.record(layer, positions=True) as rec:
        h = layer.train()(x)
    h.backward(grad)
    assert rec.positions[""][0].tolist() == wanted["S"]
    got = {n: p.grad for n, p in layer.modification.named_parameters()} | {"h": h, "x": x.grad}
    if gate:
        got["tau"] = layer.gate.tau.grad
    for name, value in got.items():
        assert value.dtype == torch.float32
        exact = torch.as_tensor(wanted[name], dtype=torch.float64).reshape(value.shape)
        size = max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=2e-5 * size)


def state_of(model):
    """Everything by which a model could differ; torchao's weights have no `tolist`."""
    return {
        "modules": {n: (id(m), type(m), sorted(m.__dict__)) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()},
        "keys": list(model.state_dict()),
        "W0": dequantised(model[0]).tolist(),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_op_at_initialisation_and_given_back(kind, method, dtype):
    model = quantised(kind, dtype=dtype)
    x = torch.randn(2, 5, K, dtype=dtype)

    def outputs():
        model.eval()
        with torch.no_grad():
            found = [model(x)]
        found.append(model(x))
        return [*found, model.train()(x)]

    base = outputs()
    before = state_of(model)
    tokengate.patch(model, "all-linear", method, rank=3)
    own = [f"0.modification.{n}" for n, _ in model[0].modification.named_parameters()]
    assert set(model.state_dict()) == {*before["keys"], *own, "0.gate.tau"}
    assert all(p.dtype == torch.float32 for p in model[0].modification.parameters())
    assert all(torch.equal(h, b) for h, b in zip(outputs(), base, strict=True))
    assert outputs()[0].dtype == dtype
    away_from_initialisation(model)
    assert not any(torch.equal(h, b) for h, b in zip(outputs(), base, strict=True))
    with tokengate.disabled(model):
        assert all(torch.equal(h, b) for h, b in zip(outputs(), base, strict=True))
    tokengate.unpatch(model)
    assert all(torch.equal(h, b) for h, b in zip(outputs(), base, strict=True))
    assert state_of(model) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, method):
    model = nn.Sequential(*quantised(kind, K, K), nn.Tanh(), *quantised(kind, K, D))
    tokengate.patch(model, "all-linear", method, rank=4)
    W0 = [dequantised(model[i]) for i in (0, 2)]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=5e-2, s=1e-4))
    x, target = torch.randn(16, K), torch.randn(16, D)
    losses = []
    for _ in range(12):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all("modification" in n or "tau" in n for n in parameters)
    assert not any(torch.equal(p, start[n]) for n, p in parameters.items())
    for i, before in zip((0, 2), W0, strict=True):
        assert torch.equal(dequantised(model[i]), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_stand_alone_and_what_is_trained_can_be_loaded(kind, method):
    model = tokengate.patch(quantised(kind), "all-linear", method, rank=3)
    fresh = copy.deepcopy(model)
    away_from_initialisation(model)
    x = torch.randn(5, K)
    h = model(x)
    others = [copy.deepcopy(model)]
    if kind in BITSANDBYTES:  # torchao gives a layer a function of its own, which pickle refuses
        others.append(pickle.loads(pickle.dumps(model)))
    assert not torch.equal(fresh(x), h)
    own = {n: v for n, v in model.state_dict().items() if "modification" in n or "tau" in n}
    fresh.load_state_dict(own, strict=False)
    for other in (*others, fresh):
        assert torch.equal(other(x), h)
        with torch.no_grad():
            for parameter in other[0].modification.parameters():
                parameter.mul_(2)
        assert not torch.equal(other(x), h)
        assert torch.equal(model(x), h)


@pytest.mark.parametrize("kind", TORCHAO)
def test_dora_s_norms_follow_a_weight_that_is_loaded(kind):
    model = tokengate.patch(quantised(kind), "all-linear", "dora", rank=3)
    before = model[0].modification.row_norms(model[0])
    model.load_state_dict(quantised(kind).state_dict(), strict=False)
    after = model[0].modification.row_norms(model[0])
    assert not torch.allclose(after, before, rtol=1e-3)
    torch.testing.assert_close(after, dequantised(model[0]).norm(dim=1))


SHAPES = [(64, 48), (96, 70), (48, 33), (16, 130), (128, 1), (256, 512)]


@pytest.mark.parametrize(("k", "d"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_blocks_are_the_rows(kind, k, d, dtype):
    layer = quantised(kind, k, d, dtype=dtype)[0]
    whole = dequantised(layer)
    blocks = list(linear_like.row_blocks(layer))
    assert all(block.is_floating_point() and not block.requires_grad for block in blocks)
    assert torch.equal(torch.cat(blocks), whole.reshape(d, k))
    # 64 elements that share a scale may lie across rows.
    assert len(blocks) >= 8 or d * k < 64 * 64


@pytest.mark.parametrize(("k", "d"), [(33, 130), (2, 65), (1, 64), (7, 9)])
@pytest.mark.parametrize("kind", ["nf4", "nf4, nested", "fp4"])
def test_row_blocks_where_elements_of_two_rows_share_a_byte(kind, k, d):
    layer = quantised(kind, k, d)[0]
    blocks = torch.cat(list(linear_like.row_blocks(layer)))
    assert torch.equal(blocks, dequantised(layer).reshape(d, k))


def test_row_blocks_with_larger_quantisation_blocks():
    layer = bitsandbytes.nn.Linear4bit(48, 96, quant_type="nf4")
    layer.weight.blocksize = 256
    layer.load_state_dict(nn.Linear(48, 96).state_dict())
    layer.to("cpu")
    assert layer.weight.quant_state.blocksize == 256
    blocks = list(linear_like.row_blocks(layer))
    assert len(blocks) == 6
    assert torch.equal(torch.cat(blocks), dequantised(layer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_s_row_norms(kind, dtype):
    layer = quantised(kind, 64, 40, dtype=dtype)[0]
    tokengate.patch(layer, "all-linear", "dora", rank=4)
    m = layer.modification
    W0 = dequantised(layer).double()
    torch.testing.assert_close(m.magnitude.double(), W0.norm(dim=1), rtol=1e-6, atol=1e-6)
    away_from_initialisation(layer, 0.2)
    V = W0 + m.scale * m.B.double() @ m.A.double()
    assert not torch.allclose(V.norm(dim=1), W0.norm(dim=1), rtol=0.05)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        m.row_norms(layer).double(), V.norm(dim=1), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", KINDS)
def test_dora_never_holds_all_of_w0(kind):
    k = d = 512
    model = quantised(kind, k, d, bias=False)
    layer = model[0]
    assert peak_allocation(lambda: dequantised(layer)) >= 4 * k * d

    def from_the_start():
        tokengate.patch(model, "all-linear", "dora", rank=4)
        away_from_initialisation(model)
        layer.modification.row_norms(layer)

    # Not even one byte for each element of W0, at any moment.
    assert 0 < peak_allocation(from_the_start) < k * d


@pytest.mark.parametrize("kind", ["nf4", "nf4, nested", "nf4 held as bf16"])
def test_the_layout_of_cpus_with_16_bit_products(kind):
    """There, bitsandbytes packs the weight anew in the first evaluation."""
    pack = getattr(functional, "_convert_weight_packed_for_cpu", None)
    if pack is None:
        pytest.skip("this bitsandbytes has no such layout")
    layer = tokengate.patch(quantised(kind, 128, 96)[0], "all-linear", "dora", rank=4)
    norms, weight = layer.modification.row_norms(layer), dequantised(layer)
    before = layer.weight.data.clone()
    layer.weight.data, layer.weight.quant_state = pack(before, layer.weight.quant_state)
    assert layer.weight.shape != before.shape
    blocks = list(linear_like.row_blocks(layer))
    assert [len(block) for block in blocks] == [32, 32, 32]
    # Its scales are in bfloat16.
    torch.testing.assert_close(torch.cat(blocks), weight, rtol=2**-8, atol=0)
    again = layer.modification.row_norms(layer)
    assert not torch.equal(again, norms)
    torch.testing.assert_close(again, norms, rtol=2**-8, atol=0)
    # M stays 0: an untrained magnitude follows.
    x, w = torch.randn(3, 128), torch.randn(3, 96)
    assert not layer.modification.factors(x, w, layer).product(w).any()
    assert torch.equal(layer.modification.magnitude, again)


def refusal(model, method="dora"):
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(tokengate.TokenGateError) as caught:
        tokengate.patch(model, "all-linear", method)
    assert not tokengate.layers(model)
    assert before == {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    return str(caught.value)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_dora_before_bitsandbytes_has_quantised(kind):
    model = nn.Sequential(BITSANDBYTES[kind](32, 24, True))
    assert refusal(model) == (
        "DoRA reads W0, which bitsandbytes has not quantised yet: move the layer to its device "
        'first, or choose method="lora".'
    )
    tokengate.patch(model.to("cpu"), "all-linear", "dora")


def test_dora_on_a_layer_that_keeps_16_bit_weights():
    layer = bitsandbytes.nn.Linear8bitLt(32, 24, has_fp16_weights=True)
    W0 = layer.weight.detach().clone()
    tokengate.patch(layer, "all-linear", "dora")
    torch.testing.assert_close(layer.modification.magnitude.detach(), W0.norm(dim=1))


def test_dora_where_no_rows_can_be_dequantised():
    prototype = pytest.importorskip(
        "torchao.prototype.quantization.int4", reason="this torchao has no such layout"
    )
    model = nn.Sequential(nn.Linear(128, 96))
    torchao.quantize_(model, prototype.PrototypeInt4WeightOnlyConfig(group_size=32))
    x = torch.randn(3, 128)
    base = model(x)
    assert refusal(model) == (
        "DoRA reads W0, which torchao holds as Int4OpaqueTensor, of which single rows cannot be "
        'dequantised: quantise in another format, or choose method="lora".'
    )
    tokengate.patch(model, "all-linear", "lora")
    assert torch.equal(model(x), base)
    model(x).sum().backward()
    assert model[0].modification.B.grad.any()


@pytest.mark.parametrize(
    "config",
    [
        torchao.Int8DynamicActivationInt8WeightConfig,
        torchao.Int8DynamicActivationIntxWeightConfig,
    ],
)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_base_that_passes_no_gradient(config, method):
    model = nn.Sequential(nn.Linear(32, 24, bias=False))
    torchao.quantize_(model, config())
    assert not model(torch.randn(3, 32, requires_grad=True)).requires_grad
    assert refusal(model, method) == (
        "target \"all-linear\" matches '0', which quantises its input too, through which torchao "
        "passes no gradient to what is before it: quantise the weights only, or exclude it."
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small language model, as a checkpoint."""
    transformers = pytest.importorskip(
        "transformers", reason="the transformers extra is not installed"
    )
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def configuration(name):
    import transformers

    if name == "torchao":
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    if name == "8 bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["8 bit", "4 bit", "torchao"])
def test_a_model_that_transformers_quantised(folder, name, method):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=configuration(name), dtype=torch.bfloat16
    )
    for module in model.modules():  # see docs/architectures.md about CPUs with AVX512-BF16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = torch.randint(3, 64, (2, 7))
    base = model(ids).logits
    tokengate.patch(model, ["q_proj", "v_proj", "down_proj"], method, rank=4)
    q = model.model.layers[0].self_attn.q_proj
    assert is_quantised(q)
    assert len(tokengate.layers(model)) == 6
    assert torch.equal(model(ids).logits, base)
    tokengate.verify(model, ids)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=5e-2, s=1e-3))
    losses = []
    for _ in range(6):
        loss = model.train()(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    tokengate.unpatch(model)
    assert torch.equal(model.eval()(ids).logits, base)


def float8_training(model):
    from torchao.float8 import convert_to_float8_training

    return convert_to_float8_training(model)


def prepared_for_quantisation(model):
    from torchao.quantization import qat

    config = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    torchao.quantize_(model, qat.QATConfig(weight_config=config, step="prepare"))
    return model


def dequantised_by_its_host(model):
    from transformers import BitsAndBytesConfig
    from transformers.integrations import dequantize_and_replace

    return dequantize_and_replace(model, BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize(
    "convert", [float8_training, prepared_for_quantisation, dequantised_by_its_host]
)
def test_a_conversion_that_replaces_patched_layers_is_named(convert):
    kind = "nf4" if convert is dequantised_by_its_host else None
    layers = [quantised(kind, 64, 64) if kind else nn.Linear(64, 64) for _ in range(2)]
    model = tokengate.patch(nn.Sequential(*layers), "all-linear", rank=2)
    assert len(tokengate.layers(model)) == 2
    model = convert(model)
    assert not tokengate.layers(model)
    with pytest.warns(UnreachedLayerWarning, match="'0.*', '1.*' of this Sequential were patched"):
        model(torch.randn(16, 64))


def test_a_weight_may_be_quantised_after_its_layer_was_patched():
    torch.manual_seed(0)
    layer = away_from_initialisation(tokengate.patch(nn.Linear(64, 32), "all-linear", rank=2))
    x = torch.randn(16, 64)
    before = layer(x)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    assert not torch.equal(layer(x), before)
    base = nn.functional.linear(x, layer.weight.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), base + layer.modification(x, base), rtol=1e-4, atol=1e-4)
