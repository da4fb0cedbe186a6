"""The same numbers as Hugging Face PEFT, where it does the same: no gate, or one always open."""

import copy
import types

import pytest
import torch
from torch import nn

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
peft = pytest.importorskip("peft", reason="the test extra is not installed")

# transformers renamed what PEFT still asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

RANK, ALPHA = 4, 6.0
# tokengate's parameters of a layer, and PEFT's.
NAMES = {
    "lora": {"A": "lora_A.default.weight", "B": "lora_B.default.weight"},
    "dora": {
        "A": "lora_A.default.weight",
        "B": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    },
    "adalora": {"P": "lora_B.default", "E": "lora_E.default", "Q": "lora_A.default"},
}
METHODS = list(NAMES)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they are 0 in a new model
                parameter.normal_(std=0.3)
    return model


TARGETS = {
    llama: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    bert: ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
}


def pair(make, method, dtype, gate=True, **more):
    """A model patched here, and the same one wrapped by PEFT, with the same values."""
    base = make().to(dtype)
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear)]
    ours = tokengate.patch(
        copy.deepcopy(base),
        TARGETS[make],
        method,
        rank=RANK,
        # PEFT divides by rank + 1e-5 here.
        scale=ALPHA / (RANK + 1e-5) if method == "adalora" else ALPHA / RANK,
        tau=-1.0,
        gate=gate,
        **({"target_rank": 2} if method == "adalora" else {}),
    )
    targets = [n for n in names if n in tokengate.layers(ours)]
    if method == "adalora":
        config = peft.AdaLoraConfig(
            init_r=RANK,
            target_r=2,
            lora_alpha=ALPHA,
            target_modules=targets,
            **{"total_step": 50, **more},
        )
    else:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=method == "dora"
        )
    # With adapters in the model's dtype; by default they, and the activations, are float32.
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, other in matched(ours, theirs, method):
            noise = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
            magnitude = mine.dim() == 1 and method == "dora"
            # bfloat16 holds what both start from, in both.
            value = (mine + 0.2 * noise) if magnitude else 0.3 * noise
            mine.copy_(value.to(torch.bfloat16))
            other.copy_(mine.reshape(other.shape))
    return ours, theirs


def matched(ours, theirs, method):
    """Each trainable parameter here with its twin in PEFT; all of both sides."""
    mine, other = {}, dict(theirs.named_parameters())
    for name, layer in tokengate.layers(ours).items():
        for key, parameter in layer.modification.named_parameters():
            mine[f"base_model.model.{name}.{NAMES[method][key]}"] = parameter
    # PEFT lets the rank it divides by be trained along, which is no part of the method.
    for name in [n for n in other if ".ranknum." in n]:
        other[name].requires_grad_(False)
    assert set(mine) == {n for n, p in other.items() if p.requires_grad}
    return [(mine[n], other[n]) for n in mine]


def batches(n, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (3, 7), generator=generator) for _ in range(n)]


def run(model, ids, dtype):
    """Logits, and the gradient of the embedded input; other gradients are left in place."""
    module = model.base_model.model if isinstance(model, peft.PeftModel) else model
    embedded = module.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=dtype).reshape(logits.shape)
    (logits.square() * 0.1 + logits * weights).sum().backward()
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gate", [True, False], ids=["open", "ungated"])
def test_float64(make, method, gate):
    ours, theirs = pair(make, method, torch.float64, gate)
    ids = batches(1)[0]
    with tokengate.disabled(ours), torch.no_grad():
        base = ours(ids).logits
    mine, other = run(ours, ids, torch.float64), run(theirs, ids, torch.float64)
    assert (mine[0] - base).abs().max() > 1e-3
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in matched(ours, theirs, method):
        assert a.grad.abs().max() > 1e-6
        torch.testing.assert_close(a.grad, b.grad.reshape(a.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_to_its_own_rounding(make, method):
    """No farther from float64 than PEFT is in bfloat16, in outputs and in every gradient."""
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        ours, theirs = pair(make, method, torch.bfloat16)
        twins = matched(ours, theirs, method)
        exact = copy.deepcopy(ours).double()
        exact_parameters = [a for a, _ in matched(exact, theirs, method)]
        results = []
        for model, parameters, dtype in (
            (exact, exact_parameters, torch.float64),
            (ours, [a for a, _ in twins], torch.bfloat16),
            (theirs, [b for _, b in twins], torch.bfloat16),
        ):
            logits, grad = run(model, batches(1, seed)[0], dtype)
            gradients = [p.grad.flatten() for p in parameters]
            results.append([t.double() for t in (logits, grad, *gradients)])
        truth, mine, other = results
        errors.append([
            [(a - t).norm() / t.norm() for a, t in zip(got, truth, strict=True)]
            for got in (mine, other)
        ])  # fmt: skip
    mine, other = torch.tensor(errors).mean(0)
    assert mine.min() > 1e-4  # it is bfloat16
    assert mine.mean() <= 1.3 * other.mean()
    assert (mine <= 3 * other).all()


def peft_orthogonality(theirs):
    """What PEFT's AdaLoraModel adds to the loss of the model inside of it."""
    outputs = types.SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))
    inner = types.SimpleNamespace(
        forward=lambda: outputs, named_parameters=theirs.base_model.model.named_parameters
    )
    stand_in = types.SimpleNamespace(
        model=inner, peft_config=theirs.peft_config, trainable_adapter_name="default"
    )
    return peft.AdaLoraModel.forward(stand_in).loss


@pytest.mark.filterwarnings("ignore::tokengate.errors.LeftOutWarning")
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("method", METHODS)
def test_twenty_sgd_steps(make, method):
    ours, theirs = pair(make, method, torch.float64)
    twins = matched(ours, theirs, method)
    start = [a.detach().clone() for a, _ in twins]
    optimizers = [torch.optim.SGD([twin[i] for twin in twins], lr=0.1) for i in (0, 1)]
    for ids in batches(20):
        losses = []
        for model in (ours, theirs):
            logits = model(input_ids=ids).logits
            labels = ids.flatten() if make is llama else ids[:, 0] % 2
            # Not the models' own loss, which transformers computes in float32.
            losses.append(nn.functional.cross_entropy(logits.flatten(0, -2), labels))
        if method == "adalora":
            penalty = 0.5 * tokengate.orthogonality(ours)  # PEFT's weight
            assert penalty > 0.1
            losses = [losses[0] + penalty, losses[1] + peft_orthogonality(theirs)]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (a, b), before in zip(twins, start, strict=True):
        assert (a - before).abs().max() > 1e-5
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("method", METHODS)
def test_the_merged_weight(make, method):
    """The matrix that a layer applies is the one PEFT merges into the base."""
    ours, theirs = pair(make, method, torch.float64)
    bases = {n: p.detach().clone() for n, p in ours.named_parameters() if n.endswith("weight")}
    merged = theirs.merge_and_unload()
    for name, layer in tokengate.layers(ours).items():
        identity = torch.eye(layer.in_features, dtype=torch.float64)
        matrix = (layer(identity) - (0 if layer.bias is None else layer.bias)).T
        assert (matrix - bases[f"{name}.weight"]).abs().max() > 1e-3
        weight = merged.get_submodule(name).weight
        torch.testing.assert_close(matrix, weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "schedule",
    [
        {"tinit": 5, "tfinal": 10, "deltaT": 1},
        {"tinit": 3, "tfinal": 8, "deltaT": 4},
        {"tinit": 1, "tfinal": 0, "deltaT": 7, "beta1": 0.5, "beta2": 0.7},
    ],
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lr", [0.0, 0.01])
def test_adalora_masks_at_every_step(schedule, optimizer, lr):
    """Fed the same gradients for 50 steps, called as PEFT's documentation says."""
    steps = 50
    ours, theirs = pair(llama, "adalora", torch.float64, total_step=steps, **schedule)
    twins = matched(ours, theirs, "adalora")
    mine, other = (optimizer([pair[i] for pair in twins], lr=lr) for i in (0, 1))
    allocator = tokengate.RankAllocator(
        ours,
        mine,
        total_steps=steps,
        initial_warmup=schedule["tinit"],
        final_warmup=schedule["tfinal"],
        interval=schedule["deltaT"],
        beta1=schedule.get("beta1", 0.85),
        beta2=schedule.get("beta2", 0.85),
    )
    generator = torch.Generator().manual_seed(3)
    seen = set()
    for step in range(1, steps + 1):
        for a, b in twins:
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.reshape(b.shape).clone()
        mine.step()
        other.step()
        theirs.base_model.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern or {}
        for name, mask in allocator.masks.items():
            assert mask.tolist() == pattern.get(f"{name}.lora_E.default", [True] * RANK), step
        for a, b in twins:
            torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-12, atol=1e-12)
        seen.add(tuple(allocator.ranks.values()))
    assert len(seen) > 4
    assert sum(allocator.ranks.values()) == 2 * len(allocator.ranks)
