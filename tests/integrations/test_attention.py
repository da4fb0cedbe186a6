"""split_attention: the same attention out of layers that are called; and back again, exactly."""

import copy
import pickle
import sys
import types

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import away_from_initialisation, snapshot
from torch import nn

import tokengate
from tokengate.integrations.attention import SplitAttention, merge_attention, split_attention

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]
B, L, S, E, H = 3, 4, 5, 8, 2


def attention(dtype=torch.float64, **options):
    """With nothing at zero, as biases and bias_k otherwise are or may be."""
    made = nn.MultiheadAttention(E, H, **{"batch_first": True, **options}).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def inputs(module, dtype, *, cross=False, batched=True, grad=True):
    """query, key, value in the shapes that `module` asks for; one tensor where they may be."""
    same = (module.kdim, module.vdim) == (E, E) and not cross
    shapes = [(B, L, E)] if same else [(B, L, E), (B, S, module.kdim), (B, S, module.vdim)]
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if not batched:
        made = [x[0] for x in made]
    elif not module.batch_first:
        made = [x.transpose(0, 1) for x in made]
    made = [x.contiguous().requires_grad_(grad) for x in made]
    return made * 3 if same else made


def masks(padding, mask, batched, width, dtype):
    """Masks that leave every query a key."""
    made = {}
    if padding is not None:
        blocked = torch.rand(B, width) < 0.4
        blocked[:, 0] = False
        chosen = blocked if padding == "bool" else torch.randn(B, width, dtype=dtype)
        made["key_padding_mask"] = chosen if batched else chosen[0]
    if mask is not None:
        kind, dims = mask
        shape = (L, width) if dims == 2 else ((B if batched else 1) * H, L, width)
        blocked = torch.rand(shape) < 0.4
        blocked[..., 0] = False
        made["attn_mask"] = blocked if kind == "bool" else torch.randn(shape, dtype=dtype)
    return made


def run(module, arguments, options):
    """Outputs, and the gradients of inputs and parameters where there are any."""
    out, weights = module(*arguments, **options)
    outputs = [out] if weights is None else [out, weights]
    if not out.requires_grad:
        return outputs
    # Not a plain sum: the weights of each query sum to a constant.
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape).to(x)).sum() for x in outputs)
    wanted = [x for x in dict.fromkeys(arguments) if x.requires_grad]
    wanted += [p for p in module.parameters() if p.requires_grad]
    return outputs + list(torch.autograd.grad(loss, wanted))


@settings(max_examples=many(100), deadline=None)
@given(
    module_options=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "add_bias_kv": st.booleans(),
            "add_zero_attn": st.booleans(),
            "batch_first": st.booleans(),
            "dropout": st.sampled_from([0.0, 0.3]),
            "kdim": st.sampled_from([None, None, 6]),
            "vdim": st.sampled_from([None, None, 7]),
        }
    ),
    call_options=st.fixed_dictionaries(
        {"need_weights": st.booleans(), "average_attn_weights": st.booleans()}
    ),
    cross=st.booleans(),
    batched=st.booleans(),
    kind=st.sampled_from(["bool", "float"]),
    padding=st.booleans(),
    mask=st.sampled_from([None, 2, 3]),
    training=st.booleans(),
    grad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_the_output_is_that_of_the_original(
    module_options, call_options, cross, batched, kind, padding, mask, training, grad, dtype, seed
):
    torch.manual_seed(seed)
    original = attention(dtype, **module_options).train(training)
    arguments = inputs(original, dtype, cross=cross, batched=batched, grad=grad)
    width = L if arguments[0] is arguments[1] else S
    options = call_options | masks(
        kind if padding else None, mask and (kind, mask), batched, width, dtype
    )
    split = split_attention(copy.deepcopy(original))
    assert type(split) is not type(original)
    # The same mask of dropout from the same seed, not only the same distribution.
    with torch.set_grad_enabled(grad):
        torch.manual_seed(seed)
        wanted = run(original, arguments, options)
        torch.manual_seed(seed)
        got = run(split, arguments, options)
    assert len(got) == len(wanted)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_a_causal_hint(need_weights, padding):
    original = attention().eval()
    arguments = inputs(original, torch.float64)
    options = {
        "attn_mask": torch.ones(L, L).triu(1).bool(),
        "need_weights": need_weights,
        **masks("bool" if padding else None, None, True, L, torch.float64),
    }
    wanted = run(original, arguments, options)
    split = split_attention(copy.deepcopy(original))
    without = run(split, arguments, options | {"attn_mask": None})
    assert not torch.allclose(without[0], wanted[0])
    for hint in (False, True):
        for one, other in zip(
            run(split, arguments, options | {"is_causal": hint}),
            run(original, arguments, options | {"is_causal": hint}),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_bfloat16_and_autocast():
    original = attention(torch.float32).eval()
    arguments = inputs(original, torch.float32)
    exact = original(*arguments)
    split = split_attention(copy.deepcopy(original))
    low = copy.deepcopy(split).bfloat16()
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            automatic = split(*arguments, need_weights=need_weights)
            types_of_torch = [
                None if x is None else x.dtype
                for x in original(*arguments, need_weights=need_weights)
            ]
        assert [None if x is None else x.dtype for x in automatic] == types_of_torch
        got = low(*(x.bfloat16() for x in arguments), need_weights=need_weights)
        assert got[0].dtype == torch.bfloat16
        for out, weights in (automatic, got):
            torch.testing.assert_close(out.float(), exact[0], rtol=0.1, atol=0.1)
            if need_weights:
                torch.testing.assert_close(weights.float(), exact[1], rtol=0.05, atol=0.05)


def test_the_names_are_those_of_the_original_and_the_memory_too():
    module = attention(kdim=None)
    before, keys = snapshot(module), list(module.state_dict())
    assert split_attention(module) is module
    assert snapshot(module) != before
    assert (
        list(module.state_dict())
        == keys
        == [
            "in_proj_weight",
            "in_proj_bias",
            "out_proj.weight",
            "out_proj.bias",
        ]
    )
    assert snapshot(module)["parameters"] == before["parameters"]
    assert [name for name, _ in module.named_children()] == [
        "out_proj",
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    assert isinstance(module, nn.MultiheadAttention)
    storage = module.in_proj_weight.untyped_storage().data_ptr()
    for i, name in enumerate(["q_proj", "k_proj", "v_proj"]):
        layer = getattr(module, name)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (E, E)
        assert torch.equal(layer.weight, module.in_proj_weight[i * E : (i + 1) * E])
        assert torch.equal(layer.bias, module.in_proj_bias[i * E : (i + 1) * E])
        assert layer.weight.untyped_storage().data_ptr() == storage
    merge_attention(module)
    assert snapshot(module) == before


def test_values_written_to_either_are_seen_by_both():
    module, other = split_attention(attention()), attention()
    assert not torch.equal(module.q_proj.weight, other.in_proj_weight[:E])
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.q_proj.weight, other.in_proj_weight[:E])
    with torch.no_grad():
        module.k_proj.weight.fill_(3.0)
        module.v_proj.bias.data.fill_(4.0)
    merge_attention(module)
    assert module.in_proj_weight[E : 2 * E].unique().tolist() == [3.0]
    assert module.in_proj_bias[2 * E :].unique().tolist() == [4.0]
    assert torch.equal(module.in_proj_weight[:E], other.in_proj_weight[:E])


def test_casts_and_flags_reach_the_projections():
    module = split_attention(attention(torch.float32))
    assert module.q_proj.weight.requires_grad
    module.requires_grad_(False).half()
    assert {p.weight.dtype for p in module.children()} == {torch.float16}
    assert not module.q_proj.weight.requires_grad
    assert module.to("meta").q_proj.weight.is_meta
    assert not module.eval().q_proj.training
    assert not split_attention(attention().eval()).q_proj.training


class Named(nn.MultiheadAttention):
    """A subclass without a forward of its own."""


@pytest.mark.parametrize("make", [nn.MultiheadAttention, Named])
def test_deepcopy_and_pickle(make, monkeypatch):
    # pytest imports this file under a name that pickle cannot find.
    monkeypatch.setitem(sys.modules, "attention_classes", types.SimpleNamespace(Named=Named))
    monkeypatch.setattr(Named, "__module__", "attention_classes")
    model = nn.ModuleDict({"attn": make(E, H, batch_first=True)}).eval()
    x = torch.randn(B, L, E)
    base = model["attn"](x, x, x)[0]
    tokengate.patch(split_attention(model), PROJECTIONS)
    away_from_initialisation(model)
    changed = model["attn"](x, x, x)[0]
    assert not torch.allclose(changed, base)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other["attn"].in_proj_weight is not model["attn"].in_proj_weight
        with torch.no_grad():
            model["attn"].in_proj_weight.add_(1.0)
            assert torch.equal(other["attn"](x, x, x)[0], changed)
            model["attn"].in_proj_weight.sub_(1.0)
        merge_attention(tokengate.unpatch(other))
        assert type(other["attn"]) is make
        torch.testing.assert_close(other["attn"](x, x, x)[0], base)
    assert isinstance(model["attn"], make)


@pytest.mark.parametrize("train", ["in_proj_weight", "in_proj_bias"])
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_projection_is_a_view_of_is_not_trained(train, grad):
    module = split_attention(nn.Sequential(attention()))
    before = snapshot(module)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(tokengate.TokenGateError, match=r"'0\.q_proj' is both a target"),
    ):
        tokengate.patch(module, ["q_proj"], train=[train])
    assert snapshot(module) == before
    tokengate.patch(module, "all-linear", train=[train])
    assert list(tokengate.layers(module)) == ["0.out_proj"]
    assert [n for n, p in module.named_parameters() if p.requires_grad and "0.out" not in n] == [
        f"0.{train}"
    ]
    tokengate.unpatch(module)
    tokengate.patch(module, ["q_proj"], train=["out_proj"])
    assert module[0].out_proj.weight.requires_grad


def test_separate_weights_may_be_trained_but_a_target_s():
    module = split_attention(nn.Sequential(attention(kdim=4, vdim=6)))
    tokengate.patch(module, ["q_proj"], train=["k_proj_weight"])
    assert module[0].k_proj_weight.requires_grad
    with pytest.raises(tokengate.TokenGateError, match="is both a target"):
        tokengate.patch(module, ["k_proj"], train=["k_proj_weight"])


def test_compiles_without_a_graph_break():
    layer, x = nn.TransformerEncoderLayer(E, H, 16, batch_first=True).eval(), torch.randn(B, L, E)
    tokengate.patch(split_attention(layer), ["q_proj", "out_proj"], rank=2, tau=0.1)
    away_from_initialisation(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    eager, got = layer(x, causal), compiled(x, causal)
    torch.testing.assert_close(got, eager)
    trainable = [p for p in layer.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(eager.square().sum(), trainable)
    grads = torch.autograd.grad(got.square().sum(), trainable)
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_positions_are_batch_first_whatever_the_attention_is():
    for batch_first in (True, False):
        module = split_attention(attention(batch_first=batch_first))
        arguments = inputs(module, torch.float64, cross=True)
        tokengate.patch(module, PROJECTIONS)
        with tokengate.record(module, positions=True) as rec:
            module(*arguments)
        shapes = {name: tuple(calls[0].shape) for name, calls in rec.positions.items()}
        assert shapes == {
            "q_proj": (B, L),
            "k_proj": (B, S),
            "v_proj": (B, S),
            "out_proj": (B, L),
        }


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
def test_every_method_with_different_widths(method):
    module = attention(torch.float32, kdim=6, vdim=7, add_bias_kv=True).eval()
    arguments = inputs(module, torch.float32)
    base = split_attention(module)(*arguments)[0]
    tokengate.patch(module, PROJECTIONS, method=method, rank=2)
    assert torch.equal(module(*arguments)[0], base)
    away_from_initialisation(module)
    out = module(*arguments)[0]
    assert not torch.allclose(out, base)
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def pair(second=nn.MultiheadAttention):
    return nn.ModuleDict({"a": nn.MultiheadAttention(E, H), "b": second(E, H)})


def replaced():
    model = pair()
    model["b"].forward = lambda *args: None
    return model


@pytest.mark.parametrize(
    ("call", "make", "message"),
    [
        (split_attention, list, r"split_attention was given a list: pass a torch.nn.Module"),
        (merge_attention, list, r"merge_attention was given a list: pass a torch.nn.Module"),
        (split_attention, lambda: nn.Linear(2, 2), "a Linear, which has no nn.MultiheadAttention"),
        (merge_attention, pair, "of a ModuleDict without a split attention: call split_attention"),
        (split_attention, lambda: pair(Own), "'b', a Own with a forward of its own"),
        (split_attention, replaced, "'b', a MultiheadAttention whose forward was replaced"),
        (split_attention, lambda: split_attention(pair(), "b"), "'b', which is split already"),
        (lambda m: split_attention(m, ["c"]), pair, "target 'c' matches no .* names are a, b"),
        (lambda m: split_attention(m, ["a", "a.out_proj"]), pair, "target 'a.out_proj' matches no"),
        (lambda m: split_attention(m, [""]), pair, r"targets=\[''\] is not a list of names"),
        (lambda m: tokengate.patch(m, ["out_proj"]), pair, "or call tokengate.integrations.att"),
        (
            lambda m: tokengate.patch(m, ["out_proj"]),
            lambda: split_attention(pair(), ["a"]),
            "'b.out_proj', whose owner 'b' is an nn.MultiheadAttention",
        ),
    ],
)
def test_bad_input_leaves_the_model_untouched(call, make, message):
    model = make()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(tokengate.TokenGateError, match=message) as error:
        call(model)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    assert before is None or snapshot(model) == before


def test_some_may_be_split_and_shared_ones_are_once():
    model = pair(Own)
    model["c"] = model["a"]
    split_attention(model, ["c"])
    assert [name for name, m in model.named_modules() if isinstance(m, SplitAttention)] == ["a"]
    assert type(model["b"]) is Own
    tokengate.patch(model, "all-linear")
    assert list(tokengate.layers(model)) == [f"a.{n}" for n in (PROJECTIONS[-1:] + PROJECTIONS[:3])]


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, L, E), (B, S, E), (B, S, E)), {}, "as many samples in each"),
        (((B, L, E), (1, S, E), (1, S, E)), {}, "as many samples in each"),
        (((B, L, E), (B, S, E), (B, S + 1, E)), {}, "as many values as keys"),
        (((B, L, E),) * 3, {"is_causal": True}, "is_causal=True without an attn_mask"),
        (((B, L, E),) * 3, {"attn_mask": torch.zeros(1, L)}, r"attn_mask has the shape \(1, 4\)"),
        (((B, L, E),) * 3, {"attn_mask": torch.zeros(L, L).int()}, "the type torch.int32: pass"),
        (
            ((B, L, E),) * 3,
            {"key_padding_mask": torch.zeros(1, L).bool()},
            r"key_padding_mask has the shape \(1, 4\) .* of the shape \(3, 4\)",
        ),
    ],
)
def test_what_would_be_broadcast_is_refused(shapes, options, message):
    module = attention(torch.float32)
    arguments = [torch.randn(shape) for shape in shapes]
    with pytest.raises((RuntimeError, AssertionError)):
        module.train()(*arguments, **options)
    with pytest.raises(tokengate.TokenGateError, match=message) as error:
        split_attention(module)(*arguments, **options)
    assert str(error.value).endswith(".")


def test_parameters_swapped_from_outside_are_read():
    """As FSDP and torch.func do it: under the old name, another object."""
    module = split_attention(attention())
    arguments = inputs(module, torch.float64)
    other = dict(attention().named_parameters())
    out = torch.func.functional_call(module, other, tuple(arguments))[0]
    assert not torch.allclose(out, module(*arguments)[0])
    module.load_state_dict(other)
    torch.testing.assert_close(out, module(*arguments)[0])
