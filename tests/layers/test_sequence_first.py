"""As many samples as positions, and the positions first: masks are not applied transposed."""

import copy

import pytest
import torch
from test_padding import SIZES, close_half, patched
from torch import nn

import tokengate
from tokengate.gates.positions import Positions
from tokengate.integrations.attention import split_attention
from tokengate.kernels.change import Change

T = 6
REAL = torch.arange(T) < torch.tensor([6, 3, 4, 1, 6, 2])[:, None]
COUNT = 22
TARGET = torch.arange(T) < torch.tensor([3, 6, 5, 1, 2, 6])[:, None]


def stated(model, run, weigh, real=REAL):
    """Reports and tau's gradients of all samples at once, and one by one without padding."""
    seen = []
    for together in (True, False):
        model.zero_grad()
        with tokengate.record(model) as rec:
            parts = [slice(None)] if together else [slice(i, i + 1) for i in range(len(real))]
            for part in parts:
                length = T if together else int(real[part].sum())
                out = run(model, part, length, together)
                (out.sin() * weigh[part, :length] * real[part, :length, None]).sum().backward()
        seen.append(
            (
                {n: layer.gate.tau.grad.item() for n, layer in tokengate.layers(model).items()},
                {n: (m.samples, m.positions) for n, m in rec.report().modules.items()},
                rec.report().by_module,
            )
        )
    return seen


def check(model, run, rel=1e-9):
    weigh = torch.randn(len(REAL), T, 1, generator=torch.Generator().manual_seed(3))
    (taus, counted, sparsity), (own_taus, own_counted, own_sparsity) = stated(model, run, weigh)
    assert set(counted.values()) == {(6, COUNT)} == set(own_counted.values())
    assert taus == pytest.approx(own_taus, rel=rel)
    assert sparsity == pytest.approx(own_sparsity, rel=1e-9)
    assert all(0 < share < 1 for share in sparsity.values())


def half_closed(model, *args, **kwargs):
    hooks = [m.register_forward_pre_hook(close_half) for m in tokengate.layers(model).values()]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return model


def test_xlnet():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0
    )
    model = patched(transformers.XLNetLMHeadModel(config), ["layer_1", "layer_2"])
    model.float()  # as its masks are
    ids = torch.randint(3, 64, (6, T))
    half_closed(model, ids)

    def run(model, part, length, together):
        mask = REAL[part].long() if together else None
        return model(ids[part, :length], attention_mask=mask).logits

    check(model, run, 1e-4)
    for layer in tokengate.layers(model).values():
        assert layer._sequence_first
        layer._sequence_first = False
    with pytest.raises(AssertionError):
        check(model, run, 1e-4)
    for layer in tokengate.layers(model).values():
        layer._sequence_first = True
    check(copy.deepcopy(model), run, 1e-4)
    # Of targets there is no mask.
    with tokengate.record(model) as rec:
        model(ids, attention_mask=REAL.long(), target_mapping=torch.eye(T).repeat(6, 1, 1))
    assert {m.positions for m in rec.report().modules.values()} == {2 * 6 * T}
    tokengate.unpatch(model)
    assert not any("_sequence_first" in module.__dict__ for module in model.modules())


def longformer(transformers):
    config = transformers.LongformerConfig(**SIZES, attention_window=4, pad_token_id=0)
    return transformers.LongformerModel(config), ["query", "key", "value", "output.dense"]


def led(transformers):
    config = transformers.LEDConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, attention_window=4,
    )  # fmt: skip
    return transformers.LEDModel(config), ["query", "key", "value", "encoder.layers.0.fc1"]


def fsmt(transformers):
    config = transformers.FSMTConfig(
        langs=["a", "b"], src_vocab_size=64, tgt_vocab_size=64, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    names = [f"encoder.layers.0.self_attn.{name}" for name in names]
    return transformers.FSMTModel(config), [*names, "encoder.layers.0.fc1", "encoder.layers.0.fc2"]


@pytest.mark.parametrize("make", [longformer, led, fsmt])
def test_layers_that_transformers_calls_sequence_first(make):
    """What is counted is what the layer's own input says, read the right way round."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, names = make(transformers)
    model = patched(model, names).float().eval()
    # Two windows of Longformer's.
    real = torch.arange(8) < torch.tensor([8, 3, 4, 1, 8, 2, 5, 7])[:, None]
    ids = torch.randint(3, 64, (8, 8))
    half_closed(model, ids)
    inputs = {}
    layers = tokengate.layers(model)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
    model(ids[:5])  # fewer samples than positions tell which is which
    first = {name for name, x in inputs.items() if x.shape[:2] == (8, 5)}
    assert first == {name for name, layer in layers.items() if layer._sequence_first}
    assert first
    with torch.no_grad(), tokengate.record(model) as rec:
        model(ids, attention_mask=real.long())
    for name, counted in rec.report().modules.items():
        x, layer = inputs[name], layers[name]
        w = nn.functional.linear(x, layer.weight)
        is_open = layer.gate(Positions(Change(w, None, layer.modification(x, w)))) != 0
        right = (is_open.T if name in first else is_open)[real].sum()
        assert (counted.samples, counted.positions) == (8, 38), name
        assert counted.modified == right, name
        assert 0 < right < 38, name


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_of_torch(batch_first, whole, kind):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    if whole:
        model = nn.TransformerEncoder(model, 2, enable_nested_tensor=batch_first)
    patched(split_attention(model), ["linear1", "linear2", "q_proj", "k_proj", "out_proj"])
    x = torch.randn(6, T, 8, dtype=torch.float64)
    half_closed(model, x)
    padding = ~REAL
    if kind == "float":
        padding = torch.zeros(6, T, dtype=torch.float64).masked_fill(padding, -torch.inf)

    def run(model, part, length, together):
        given = x[part, :length]
        mask = padding[part] if together else None
        out = model(given if batch_first else given.transpose(0, 1), src_key_padding_mask=mask)
        return out if batch_first else out.transpose(0, 1)

    check(model, run)
    with tokengate.record(model) as rec:
        model(x)
    assert {m.positions for m in rec.report().modules.values()} == {6 * T}


@pytest.mark.parametrize("batch_first", [True, False])
def test_slices_in_an_encoder_of_torch(batch_first):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    tokengate.patch(model, ["linear1.a"], slices={"linear1": tokengate.Slices(a=4, b=12)}, tau=9.0)
    with torch.no_grad(), tokengate.record(model, positions=True) as rec:
        # One sample has no closed position that is not padding.
        model.linear1.a.modification.B.fill_(1e-9)
        x = torch.randn(6, T, 8)
        x = x.masked_fill(REAL.unsqueeze(-1), 1.0)
        model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=~REAL)
    assert model.linear1.a._sequence_first != batch_first
    assert rec.report().modules["linear1.a"].samples == 6
    assert rec.report().modules["linear1.a"].positions == COUNT


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_decoder_of_torch(batch_first):
    """Source and target are as long, and padded in other ways."""
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=batch_first)
    patched(split_attention(model), ["linear1", "q_proj", "k_proj", "v_proj", "out_proj"])
    source, target = torch.randn(2, 6, T, 8, dtype=torch.float64)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    masks = {"src_key_padding_mask": ~REAL, "memory_key_padding_mask": ~REAL}
    with tokengate.record(model) as rec:
        model(source, target, tgt_key_padding_mask=~TARGET, **masks)
    for name, counted in rec.report().modules.items():
        of_source = name.startswith("encoder") or name.endswith(
            ("multihead_attn.k_proj", "multihead_attn.v_proj")
        )
        assert counted.positions == (COUNT if of_source else 23), name
    with tokengate.record(model) as rec:
        model(source, target, tgt_key_padding_mask=~REAL)
    for name, counted in rec.report().modules.items():
        target_alone = name.startswith("decoder") and not name.endswith(
            ("multihead_attn.k_proj", "multihead_attn.v_proj")
        )
        assert counted.positions == (COUNT if target_alone else 6 * T), name
