"""Without gradients the same is computed, of whatever the parameters are at the time."""

import copy
import pickle

import pytest
import torch
import transformers
from models import away_from_initialisation
from torch import nn

import tokengate

METHODS = {
    "lora": tokengate.methods.LoRA,
    "dora": tokengate.methods.DoRA,
    "adalora": tokengate.methods.AdaLoRA,
    "adapter": tokengate.methods.Adapter,
}


@pytest.fixture(params=METHODS)
def layer(request):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    tokengate.patch(layer, "all-linear", request.param, rank=3, tau=0.4)
    return away_from_initialisation(layer).eval()


def step(layer):
    optimizer = torch.optim.SGD(layer.modification.parameters(), lr=0.5)
    for p in layer.modification.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def step_that_raises_no_version(layer):
    # As DeepSpeed does it: the optimiser has copies, which are written back through `.data`.
    master = nn.Parameter(torch.zeros(1))
    master.grad = torch.ones(1)
    torch.optim.SGD([master], lr=0.5).step()
    for p in layer.modification.parameters():
        p.data.add_(0.5)


def written_in_place(layer):
    with torch.no_grad():
        for p in layer.modification.parameters():
            p.mul_(2)


def written_in_inference_mode(layer):
    with torch.inference_mode():
        for p in layer.modification.parameters():
            p.mul_(2)


def data_and_eval(layer):
    for p in layer.modification.parameters():
        p.data.mul_(2)
    layer.eval()


def other_parameters(layer):
    for name, p in list(layer.modification.named_parameters()):
        setattr(layer.modification, name, nn.Parameter(p.detach() * 2))


def other_parameters_past_setattr(layer):
    for name, p in list(layer.modification.named_parameters()):
        layer.modification._parameters[name] = nn.Parameter(p.detach() * 2)


def loaded(layer):
    state = {k: v * 2 if "modification" in k else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)


def another_scale(layer):
    layer.modification.scale *= 2


CHANGES = [
    step,
    step_that_raises_no_version,
    written_in_place,
    written_in_inference_mode,
    data_and_eval,
    other_parameters,
    other_parameters_past_setattr,
    loaded,
    another_scale,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(layer, change):
    x = torch.randn(7, 6)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        after = layer(x)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, layer(x).detach())


def test_W0_is_part_of_what_dora_remembers():
    layer = tokengate.patch(nn.Linear(6, 5), "all-linear", "dora", rank=3).eval()
    away_from_initialisation(layer)
    x = torch.randn(7, 6)
    with torch.no_grad():
        before = layer(x) / layer.weight.norm()
        layer.weight.mul_(torch.arange(1.0, 6.0)[:, None])
        after = layer(x)
    assert not torch.allclose(before, after / layer.weight.norm(), atol=1e-3)
    torch.testing.assert_close(after, layer(x).detach())


def test_sixteen_bits(layer):
    layer.to(torch.bfloat16)
    x = torch.randn(7, 6).bfloat16()
    with torch.no_grad():
        first, second = layer(x), layer(x)
    assert layer.modification.scale == 0.5
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)
    assert torch.equal(first, layer(x).detach())
    with tokengate.disabled(layer):
        assert not torch.equal(first, layer(x))


def test_another_compute_dtype_has_maps_of_its_own(layer):
    x = torch.randn(7, 6)
    with torch.no_grad():
        wide = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = layer(x)
        again = layer(x)
    assert narrow.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    assert torch.equal(wide, again)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own(layer, copied):
    x = torch.randn(7, 6)
    with torch.no_grad():
        before = layer(x)
        other = copied(layer)
        written_in_place(other)
        changed = other(x)
        assert torch.equal(layer(x), before)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(changed, other(x).detach())


def test_functional_call_has_its_own(layer):
    x = torch.randn(7, 6)
    with torch.no_grad():
        before, outputs = layer(x), []
        for factor in (2.0, 3.0, 4.0):  # their memory is likely to be the same, one after another
            other = {
                n: p * factor if "modification" in n else p for n, p in layer.named_parameters()
            }
            outputs.append(torch.func.functional_call(layer, other, (x,)))
            del other
        for factor, output in zip((2.0, 3.0, 4.0), outputs, strict=True):
            wanted = copy.deepcopy(layer)
            for p in wanted.modification.parameters():
                p.mul_(factor)
            assert not torch.equal(output, before)
            torch.testing.assert_close(output, wanted(x))
        assert torch.equal(layer(x), before)


def test_inference_mode_leaves_what_trains(layer):
    x = torch.randn(7, 6)
    with torch.inference_mode():
        inside = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), inside.clone())
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.modification.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_gives_what_forwards_of_all_tokens_give(method, cache):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        attn_implementation="eager",
        pad_token_id=0,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids = torch.randint(1, 40, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False}
    if cache is not None:
        options |= {"cache_implementation": cache, "disable_compile": True}
    base = model.generate(ids, **options)
    tokengate.patch(model, ["q_proj", "v_proj", "down_proj"], method, rank=4, tau=0.5)
    away_from_initialisation(model, 0.8)
    tokengate.calibrate(model, [{"input_ids": base}], sparsity=0.5)
    found, wanted = model.generate(ids, **options), ids
    for _ in range(6):  # with gradients: the maps are made anew, all tokens at once
        last = model(input_ids=wanted, use_cache=False).logits[:, -1].argmax(-1)
        wanted = torch.cat([wanted, last[:, None]], dim=1)
    assert not torch.equal(found, base)
    assert torch.equal(found, wanted)
