"""Accelerate's hooks and wrappers: a dispatched or offloaded model is gated as any other."""

import copy

import pytest
import torch
from models import Net, away_from_initialisation
from torch import nn

import tokengate
from tokengate.integrations.attention import split_attention
from tokengate.methods import base

# Some of the optimisers here move tau by another rule than its own.
pytestmark = pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")

accelerate = pytest.importorskip("accelerate", reason="the transformers extra is not installed")
hooks = pytest.importorskip("accelerate.hooks")

TARGETS = ["q_proj", "v_proj", "fc1", "fc2"]
TAUS = {"LoRA": 0.2, "DoRA": 0.4, "AdaLoRA": 0.02, "Adapter": 0.2}
METHODS = ["lora", "dora", "adalora", "adapter"]


def plain(model, folder):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.add_hook_to_module(module, hooks.ModelHook())


def in_turn(model, folder):
    plain(model, folder)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hook = hooks.AlignDevicesHook("cpu", offload=True)
            hooks.add_hook_to_module(module, hook, append=True)


def on_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device="cpu")


def one_block(model, folder):
    places = {"blocks.0": "disk", "blocks.1": "cpu", "head": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


WAYS = [plain, in_turn, on_cpu, on_disk, one_block]


def net():
    torch.manual_seed(0)
    return Net().double()


def dispatched(way, folder=None, model=None):
    model = net() if model is None else model
    way(model, folder and folder / "offloaded")
    return model


def held(model):
    """What hooks put on the instances, and the parameters as objects."""
    attributes = {
        name: {k: module.__dict__.get(k) for k in ("forward", "_old_forward", "_hf_hook")}
        for name, module in model.named_modules()
    }
    return attributes, {n: id(p) for n, p in model.named_parameters()}


def patch(model, method):
    torch.manual_seed(1)
    return tokengate.patch(model, TARGETS, method=method, rank=2, penalty=0.1)


def trained(model):
    """Outputs, losses and parameters over four steps, with closed and open positions."""
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            for parameter in layer.modification.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            layer.gate.tau.fill_(TAUS[type(layer.modification).__name__])
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=1e-2, s=1e-2))
    x = torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen = []
    with tokengate.record(model) as rec:
        for _ in range(4):
            out = model(x)
            optimizer.zero_grad()
            out.square().sum().backward()
            seen += [out.detach(), *(p.grad.clone() for p in parameters(model).values())]
            optimizer.step()
    return [*seen, *(p.detach() for p in parameters(model).values())], rec.report()


def parameters(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_a_dispatched_model_is_trained_as_one_that_is_not(way, method, tmp_path):
    wanted, report = trained(patch(net(), method))
    assert 0 < report.sparsity < 1
    model = patch(dispatched(way, tmp_path), method)
    got, counted = trained(model)
    assert counted.by_module == report.by_module
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    tokengate.verify(model, torch.randn(2, 5, 8, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_changes_at_first_and_unpatch_gives_it_back(way, method, tmp_path):
    model = dispatched(way, tmp_path)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    wanted, before = model(x), held(model)
    patch(model, method)
    assert held(model) != before
    tokengate.unpatch(model)
    assert held(model) == before
    patch(model, method)
    assert torch.equal(model(x), wanted)
    away_from_initialisation(model)
    assert not torch.equal(model(x), wanted)
    with tokengate.disabled(model):
        assert torch.equal(model(x), wanted)
    tokengate.unpatch(model)
    assert held(model)[0] == before[0]
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_hooks_removed_in_between(way, tmp_path):
    model = patch(dispatched(way, tmp_path), "dora")
    away_from_initialisation(model)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    wanted = model(x)
    base = net()(x)
    assert not torch.equal(wanted, base)
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(x), wanted)
    assert "forward" in model.blocks[0].fc1.__dict__  # Accelerate leaves the bound method there
    tokengate.unpatch(model)
    assert torch.equal(model(x), base)
    patch(model, "dora")
    assert torch.equal(model(x), base)
    assert not torch.equal(away_from_initialisation(model)(x), base)


def test_without_the_new_route_the_old_code_would_run():
    model = dispatched(plain)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    base = model(x)
    away_from_initialisation(patch(model, "lora"))
    assert not torch.equal(model(x), base)
    for layer in tokengate.layers(model).values():
        layer._old_forward = nn.Linear.forward.__get__(layer)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("way", [plain, in_turn])
def test_hooks_added_to_the_layers_after_patching(way, tmp_path):
    wanted, _ = trained(patch(net(), "dora"))
    model = patch(net(), "dora")
    for layer in tokengate.layers(model).values():
        way(layer, tmp_path)
    got, _ = trained(model)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    tokengate.unpatch(model)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert torch.equal(model(x), net()(x))


def test_a_patched_model_that_is_dispatched():
    wanted, _ = trained(patch(net(), "dora"))
    model = patch(net(), "dora")
    places = {"blocks.0": "cpu", "blocks.1": "cpu", "head": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert hasattr(model.blocks[0].fc1.modification, "_hf_hook")
    got, _ = trained(model)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", [on_cpu, on_disk])
@pytest.mark.parametrize("options", [{}, {"gate": False}, {"method": "dora"}])
@pytest.mark.parametrize("large", [0, 2**17], ids=["branched", "apart"])
def test_modifications_are_not_offloaded(way, options, large, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_LARGE", large)
    model = dispatched(way, tmp_path, tokengate.patch(net(), TARGETS, **options))
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(tokengate.TokenGateError, match="offloaded together with its modif"):
        model(x)
    # What the sentence says to do.
    hooks.remove_hook_from_submodules(model)
    tokengate.unpatch(model)
    model = patch(dispatched(way, tmp_path, model), "lora")
    away_from_initialisation(model)(x).sum().backward()
    assert all(p.grad is not None for p in parameters(model).values())


def test_modifications_that_a_module_around_them_offloads():
    model = net()
    tokengate.patch(model, ["fc1"])
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["Block"])
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with pytest.raises(tokengate.TokenGateError, match="offloaded together with its modif"):
        model(x)
    with pytest.raises(tokengate.TokenGateError, match="offloaded together with its modif"):
        tokengate.verify(model, x)
    with torch.no_grad():  # where nothing is trained, there is nothing to lose
        assert torch.equal(model(x), net()(x))


def test_a_layer_that_is_offloaded_with_others():
    model = net()
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["Block"])
    with pytest.raises(
        tokengate.TokenGateError, match=r"'blocks\.0\..*with the whole of 'blocks\.0'"
    ):
        tokengate.patch(model, ["fc1"])
    tokengate.patch(model, ["head"])
    away_from_initialisation(model)(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    assert model.head.modification.B.grad is not None


def test_what_is_offloaded_cannot_be_trained(tmp_path):
    model = dispatched(one_block, tmp_path)
    with pytest.raises(
        tokengate.TokenGateError, match=r"train names 'blocks\.0\.norm\.weight', .*off"
    ):
        tokengate.patch(model, ["fc1"], train=["norm"])
    assert tokengate.layers(model) == {}
    tokengate.patch(model, ["fc1"], train=["blocks.1.norm"])
    model(torch.randn(2, 3, 8, dtype=torch.float64)).sum().backward()
    assert model.blocks[1].norm.weight.grad is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", [on_cpu, on_disk])
def test_an_attention_that_was_split_before(way, method, tmp_path):
    """Its hook is on the attention, which holds the weights of the projections."""

    def split():
        torch.manual_seed(0)
        return split_attention(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).double())

    def output(model):
        torch.manual_seed(1)
        tokengate.patch(model, ["q_proj", "v_proj"], method, rank=2, dropout=0.0, tau=0.01)
        away_from_initialisation(model)
        return model(torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 8))

    wanted = output(split())
    model = dispatched(way, tmp_path, split())
    assert model.self_attn.q_proj.weight.is_meta
    got = output(model)
    assert not any(p.is_meta for p in parameters(model).values())
    assert model.self_attn.q_proj.weight.is_meta
    assert torch.equal(got, wanted)
    assert not torch.equal(got, split()(torch.linspace(-1, 1, 48).double().view(2, 3, 8)))
    got.square().sum().backward()
    assert all(p.grad is not None for p in parameters(model).values())


def test_other_forwards_on_the_instance_are_refused():
    def replaced(layer):
        layer.forward = lambda x: x

    def replaced_and_hooked(layer):
        replaced(layer)
        plain(layer, None)

    def hooked_and_replaced(layer):
        plain(layer, None)
        layer.forward = lambda x, hooked=layer.forward: hooked(x)

    for change in (replaced, replaced_and_hooked, hooked_and_replaced):
        model = net()
        change(model.head)
        with pytest.raises(tokengate.TokenGateError, match="forward was replaced on the instance"):
            tokengate.patch(model, ["head"])


def test_a_copy_of_a_hooked_model_is_its_own():
    model = patch(dispatched(plain), "lora")
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    base = model(x)
    other = away_from_initialisation(copy.deepcopy(model))
    assert torch.equal(model(x), base)
    assert not torch.equal(other(x), base)


def test_layerwise_casting_leaves_the_modifications_in_float32():
    model = Net()
    tokengate.patch(model, TARGETS)
    away_from_initialisation(model)
    x = torch.randn(3, 5, 8)
    wanted = model(x)
    for layer in tokengate.layers(model).values():
        hook = hooks.LayerwiseCastingHook(torch.float8_e4m3fn, torch.float32, non_blocking=False)
        hooks.add_hook_to_module(layer, hook)
        assert layer.weight.dtype == torch.float8_e4m3fn
        assert {p.dtype for p in layer.modification.parameters()} == {torch.float32}
        assert layer.gate.tau.dtype == torch.float32
    assert (model(x) - wanted).abs().max() < 0.5


@pytest.mark.usefixtures("own_accelerate")
def test_inside_of_prepare():
    """It replaces the root's forward, for outputs in float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    ids = torch.randint(3, 64, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    for first in ("patch", "prepare"):
        model = transformers.LlamaForCausalLM(config)
        if first == "prepare":
            model = accelerator.prepare_model(model)
        tokengate.patch(model, ["q_proj", "down_proj"], penalty=0.1)
        if first == "patch":
            model = accelerator.prepare_model(model)
        assert "forward" in model.__dict__
        for call in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
            model.zero_grad()
            with tokengate.record(model) as rec:
                logits = model(**call).logits
            assert logits.dtype == torch.float32
            counted = 9 if "attention_mask" in call else 12
            assert {m.positions for m in rec.report().modules.values()} == {counted}
            logits.sum().backward()
            # Nothing is modified yet, so that lambda alone moves tau.
            for layer in tokengate.layers(model).values():
                assert layer.gate.tau.grad.item() == pytest.approx(-0.1 * counted)
