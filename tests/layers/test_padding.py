"""Attention masks on their way to the gates: padded positions count in nothing."""

import copy

import pytest
import torch
from models import snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.layers import calls

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
LENGTHS = [6, 3, 4]
IDS = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(1))


def close_half(layer, args):
    """A hook: set tau to the median ratio of what the layer is given."""
    x = args[0].detach().reshape(-1, layer.in_features)
    with torch.no_grad():
        w = nn.functional.linear(x, layer.weight)
        ratio = layer.modification(x, w).norm(dim=-1) / w.norm(dim=-1)
        layer.gate.tau.fill_(ratio.median() * 1.0001)


def patched(model, targets=("q_proj", "v_proj", "up_proj", "down_proj"), **options):
    model = tokengate.patch(model.double(), list(targets), penalty=0.3, **options)
    with torch.no_grad():
        for i, layer in enumerate(tokengate.layers(model).values()):
            generator = torch.Generator().manual_seed(i)
            for p in layer.modification.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
            layer.gate.tau.fill_(0.35)
    return model


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    model = patched(transformers.LlamaForCausalLM(config), **options)
    hooks = [m.register_forward_pre_hook(close_half) for m in tokengate.layers(model).values()]
    model(IDS)
    for hook in hooks:
        hook.remove()
    return model


def batch(side):
    """Ids, mask and position ids, padded on one side, with a weight for each position."""
    mask = torch.zeros(3, 6, dtype=torch.long)
    ids, weights = torch.zeros_like(mask), torch.zeros(3, 6, dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        where = slice(0, n) if side == "right" else slice(6 - n, 6)
        mask[i, where], ids[i, where] = 1, IDS[i, :n]
        weights[i, where] = torch.linspace(-1, 1, 6, dtype=torch.float64)[:n]
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0), weights


def loss_of(logits, weights):
    return (logits.sin().sum(-1) * weights).sum()


def taus(model):
    return {n: layer.gate.tau.grad.item() for n, layer in tokengate.layers(model).items()}


def alone(model, side="right"):
    """tau's gradients and the report of the samples one by one, without any padding."""
    model.zero_grad()
    with tokengate.record(model) as rec:
        for i, n in enumerate(LENGTHS):
            logits = model(IDS[i : i + 1, :n]).logits
            weights = torch.linspace(-1, 1, 6, dtype=torch.float64)[:n]
            loss_of(logits, weights).backward()
    return taus(model), rec.report()


CALLS = {
    "keyword": lambda m, ids, mask, places: m(ids, attention_mask=mask, position_ids=places).logits,
    "positional": lambda m, ids, mask, places: m(ids, mask, places).logits,
    "bool": lambda m, ids, mask, places: (
        m(ids, attention_mask=mask.bool(), position_ids=places).logits
    ),
    "inner": lambda m, ids, mask, places: m.lm_head(
        m.model(ids, attention_mask=mask, position_ids=places).last_hidden_state
    ),
    "embedded": lambda m, ids, mask, places: (
        m(
            inputs_embeds=m.get_input_embeddings()(ids), attention_mask=mask, position_ids=places
        ).logits
    ),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("call", list(CALLS))
def test_padding_counts_in_nothing(side, call):
    model = llama()
    wanted, report = alone(model)
    ids, mask, places, weights = batch(side)
    model.zero_grad()
    with tokengate.record(model) as rec:
        logits = CALLS[call](model, ids, mask, places)
    loss_of(logits, weights).backward()
    assert taus(model) == pytest.approx(wanted, rel=1e-9)
    for name, module in rec.report().modules.items():
        assert 0 < report.by_module[name] < 1
        assert module.sparsity == pytest.approx(report.by_module[name], rel=1e-12)
        assert (module.samples, module.positions) == (3, sum(LENGTHS))
    # Without the mask the padding would count: by lambda and in the report.
    model.zero_grad()
    with tokengate.record(model) as rec:
        model(ids).logits.sum().backward()
    assert next(iter(rec.report().modules.values())).positions == 18
    assert taus(model) != pytest.approx(wanted, rel=1e-3)


def test_the_mask_changes_no_output_and_does_not_stay():
    model = llama()
    ids, mask, places, _ = batch("right")
    before = snapshot(model)
    out = model(ids, attention_mask=mask, position_ids=places).logits
    assert snapshot(model) == before
    assert not calls._THREAD.running
    with tokengate.record(model) as rec:
        model.model.layers[0].self_attn.q_proj(torch.randn(3, 6, 32, dtype=torch.float64))
    assert rec.report().modules["model.layers.0.self_attn.q_proj"].positions == 18
    unmasked = nn.Module.__call__
    for module in model.modules():
        module._forward_pre_hooks.clear()
    assert unmasked is nn.Module.__call__
    assert torch.equal(model(ids, attention_mask=mask, position_ids=places).logits, out)


def test_a_forward_that_fails_leaves_no_mask_behind():
    model = llama()
    ids, mask, _, _ = batch("right")
    model.model.norm.forward = None
    with pytest.raises(TypeError):
        model(ids, attention_mask=mask)
    assert not calls._THREAD.running


@pytest.mark.parametrize("cached", [True, False])
def test_generate_with_left_padding(cached):
    model = llama().eval()
    ids, mask, _, _ = batch("left")
    with tokengate.record(model) as rec:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
            use_cache=cached, pad_token_id=0,
        )  # fmt: skip
    assert out.shape == (3, 10)
    # Four forwards; with a cache each after the first has one position for each sample.
    positions = 13 + 3 * 3 if cached else 13 + 16 + 19 + 22
    assert {m.positions for m in rec.report().modules.values()} == {positions}


def test_a_padded_chunk_after_a_cache():
    model = llama().eval()
    ids, mask, _, _ = batch("right")
    full = torch.cat((torch.ones_like(mask), mask), 1)
    with tokengate.record(model) as rec:
        first = model(ids, use_cache=True)
        names = ("cache", "past_key_values")
        name = next(name for name in names if getattr(first, name, None) is not None)
        model(ids, attention_mask=full, **{name: getattr(first, name)})
    assert {m.positions for m in rec.report().modules.values()} == {18 + sum(LENGTHS)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_with_a_static_cache(attention):
    """The model itself is called with a mask of four dimensions."""
    counted = {}
    ids, mask, _, _ = batch("left")
    for cache in ("dynamic", "static"):
        model = llama().eval()
        model.set_attn_implementation(attention)
        shapes = set()
        model.register_forward_pre_hook(
            lambda m, a, k, shapes=shapes: shapes.add(k["attention_mask"].dim()), with_kwargs=True
        )
        with tokengate.record(model) as rec:
            model.generate(
                ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                cache_implementation=cache, disable_compile=True, pad_token_id=0,
            )  # fmt: skip
        assert shapes == {2 if cache == "dynamic" else 4}
        counted[cache] = {
            name: (m.samples, m.positions, m.modified, round(m.sparsity, 9))
            for name, m in rec.report().modules.items()
        }
    assert counted["static"] == counted["dynamic"]
    assert {(samples, positions) for samples, positions, *_ in counted["static"].values()} == {
        (12, 13 + 3 * 3)
    }
    assert all(0 < modified < 22 for _, _, modified, _ in counted["static"].values())


def test_generate_with_a_mask_for_each_kind_of_layer():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = patched(transformers.Gemma3ForCausalLM(config)).eval()
    ids, mask, _, _ = batch("left")
    kinds = set()
    model.register_forward_pre_hook(
        lambda m, a, k: kinds.add(type(k["attention_mask"])), with_kwargs=True
    )
    with tokengate.record(model) as rec:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
            cache_implementation="static", disable_compile=True, pad_token_id=0,
        )  # fmt: skip
    assert kinds == {dict}
    assert {m.positions for m in rec.report().modules.values()} == {13 + 3 * 3}


def four_dimensions(kind, allowed, heads=1):
    """`(B, T, T)` as a mask of one kind."""
    mask = allowed[:, None].repeat(1, heads, 1, 1)
    if kind == "bool":
        return mask
    lowest = torch.finfo(torch.float64).min if kind == "lowest" else -torch.inf
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, lowest)


@pytest.mark.parametrize("kind", ["bool", "lowest", "inf"])
def test_a_mask_of_four_dimensions_from_the_user(kind):
    model = llama()
    causal = torch.ones(6, 6, dtype=torch.bool).tril()

    def positions(mask, ids=IDS):
        with tokengate.record(model) as rec:
            model(ids, attention_mask=mask)
        (counted,) = {m.positions for m in rec.report().modules.values()}
        return counted

    # Two documents in one row; padding after them attends to nothing, or to itself.
    packed = causal.clone()
    packed[3:, :3] = False
    assert positions(four_dimensions(kind, packed.expand(3, 6, 6))) == 18
    packed[4:] = False
    assert positions(four_dimensions(kind, packed.expand(3, 6, 6))) == 12
    assert positions(four_dimensions(kind, packed[None])) == 12  # one for the whole batch
    # What only padding tells apart on the right cannot be told.
    right = batch("right")[1].bool()
    assert positions(right.long()) == 13
    assert positions(four_dimensions(kind, causal & right[:, None])) == 18
    left = batch("left")[1].bool()
    assert positions(four_dimensions(kind, causal & left[:, None])) == 13


class Lenient(nn.Module):
    """Takes whatever mask and ids, and uses the mask for nothing."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj = nn.Embedding(64, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        return self.proj(self.embed(input_ids))


@pytest.mark.parametrize(
    ("shape", "ids", "real"),
    [
        ((3, 2, 6, 6), (3, 6), 15),
        ((1, 2, 6, 6), (3, 6), 15),
        # What is not of these positions masks none.
        ((2, 1, 6, 6), (3, 6), 18),
        ((6, 1, 6, 6), (3, 6), 18),
        ((3, 1, 6, 6), (1, 6), 6),
        ((3, 1, 5, 6), (3, 6), 18),
        ((3, 1, 6, 6), (6,), 6),
        ((1, 1, 6, 6), (6,), 6),
        ((1, 1, 1, 1), (), 1),
        ((2, 6), (6,), 6),
        ((2, 6), (), 1),
    ],
)
@pytest.mark.parametrize("cache", [None, object()])
def test_a_mask_of_other_sizes_stops_no_forward(shape, ids, real, cache):
    """What the model takes, it is given, whatever that says of positions."""
    model = tokengate.patch(Lenient(), ["proj"], rank=2)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., -1, :] = False  # in four dimensions: the last position attends to nothing
    with tokengate.record(model) as rec:
        out = model(torch.ones(ids, dtype=torch.long), mask, cache)
    assert out.shape == (*ids, 8)
    assert rec.report().modules["proj"].positions == real


def test_a_bias_of_four_dimensions_masks_nothing():
    model = llama()
    distance = torch.arange(6)[:, None] - torch.arange(6)
    bias = -3.0 * distance.clamp(min=0).double() - 1e4 * (distance < 0)
    with tokengate.record(model) as rec:
        model(IDS, attention_mask=(bias - 100).expand(3, 1, 6, 6))
    assert {m.positions for m in rec.report().modules.values()} == {18}


# transformers is renaming it.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["transformers", "block", "function"])
def test_activation_checkpointing(reentrant, how):
    """Two forwards with masks of their own, and then one backward."""
    gradients = []
    for checkpointed in (False, True):
        model = llama(dropout=0.2).train()
        if checkpointed and how == "transformers":
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        elif checkpointed and how == "block":
            for layer in model.model.layers:
                mlp = layer.mlp
                mlp.forward = lambda x, plain=mlp.forward: checkpoint(
                    plain, x, use_reentrant=reentrant
                )
        elif checkpointed:
            whole = model.model.forward
            model.model.forward = lambda *args, whole=whole, **kwargs: (
                checkpoint(whole, *args, use_reentrant=reentrant, **kwargs)
                if not reentrant
                else whole(*args, **kwargs)
            )
        torch.manual_seed(5)
        total = 0
        for side in ("left", "right"):
            ids, mask, places, weights = batch(side)
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(
                inputs_embeds=embedded, attention_mask=mask, position_ids=places, use_cache=False
            ).logits
            total = total + loss_of(logits, weights)
        total.backward()
        gradients.append(taus(model))
        everything = [p.grad for p in model.parameters() if p.grad is not None]
        gradients[-1]["sum"] = sum(g.abs().sum() for g in everything).item()
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-9)


def test_an_encoder_decoder_keeps_the_masks_of_its_parts_apart():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    model = patched(transformers.T5ForConditionalGeneration(config), ["q", "k", "v"])
    ids, mask, _, _ = batch("right")
    target = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    for given in (target, None):
        with tokengate.record(model) as rec:
            model(ids, attention_mask=mask, decoder_input_ids=ids, decoder_attention_mask=given)
        positions = {n: m.positions for n, m in rec.report().modules.items()}
        decoded = 18 if given is None else 13
        for name, counted in positions.items():
            encoder = name.startswith("encoder")
            cross = "EncDecAttention" in name and not name.endswith(".q")
            assert counted == (13 if encoder or cross else decoded), name
    assert mask.sum() == 13
    target[0, 0] = 0
    with tokengate.record(model) as rec:
        model(ids, attention_mask=mask, decoder_input_ids=ids, decoder_attention_mask=target)
    assert {m.positions for m in rec.report().modules.values()} == {12, 13}


def test_a_tower_that_takes_pixels_is_never_masked():
    """Text and image of sixteen positions each: text padding changes no image statistics."""
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    del vision["vocab_size"]
    config = transformers.SiglipConfig(
        text_config={**SIZES, "max_position_embeddings": 16, "projection_size": 32},
        vision_config=vision,
    )
    model = patched(transformers.SiglipModel(config), ["q_proj"])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mask = (torch.arange(16)[None] < torch.tensor([[16], [5]])).long()
    with tokengate.record(model) as rec:
        model(input_ids=torch.ones_like(mask), pixel_values=images, attention_mask=mask)
    for name, module in rec.report().modules.items():
        assert module.positions == (21 if name.startswith("text") else 32), name


def test_an_additive_mask_is_no_padding_mask():
    """Longformer's layers are given 0 for real positions, in two dimensions."""
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**SIZES, attention_window=4, pad_token_id=0)
    model = patched(transformers.LongformerModel(config), ["output.dense"])
    ids, mask = torch.randint(3, 64, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    with tokengate.record(model) as rec:
        model(ids, attention_mask=mask)
    assert {m.positions for m in rec.report().modules.values()} == {13}


def test_flattened_positions():
    """OPT's feed-forward layers see (B T, C)."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
        word_embed_proj_dim=32, dropout=0.0,
    )  # fmt: skip
    model = patched(transformers.OPTForCausalLM(config), ["fc1", "q_proj"])
    ids, mask, _, _ = batch("right")
    with tokengate.record(model) as rec:
        model(ids, attention_mask=mask)
    assert {(m.samples, m.positions) for m in rec.report().modules.values()} == {(3, 13)}


def test_under_compile():
    torch.compiler.reset()
    ids, mask, places, weights = batch("right")
    gradients = []
    for compiled in (False, True):
        model = llama().eval()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss_of(run(ids, attention_mask=mask, position_ids=places).logits, weights).backward()
        gradients.append(taus(model))
        if compiled:  # the mask is an input of the graph, not a constant in it
            model.zero_grad()
            run(ids, attention_mask=mask.flip(0), position_ids=places).logits.sum().backward()
            other = taus(model)
            model.zero_grad()
            model(ids, attention_mask=mask.flip(0), position_ids=places).logits.sum().backward()
            assert other == pytest.approx(taus(model), rel=1e-9)
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-9)


def test_inside_of_ddp_and_in_copies(tmp_path):
    model = llama()
    wanted, _ = alone(model)
    ids, mask, places, weights = batch("left")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model.zero_grad()
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss_of(wrapped(ids, attention_mask=mask, position_ids=places).logits, weights).backward()
        assert taus(model) == pytest.approx(wanted, rel=1e-9)
    finally:
        torch.distributed.destroy_process_group()
    model.zero_grad()
    other = copy.deepcopy(model)
    loss_of(other(ids, attention_mask=mask, position_ids=places).logits, weights).backward()
    assert taus(other) == pytest.approx(wanted, rel=1e-9)
    assert next(iter(tokengate.layers(model).values())).gate.tau.grad is None


def test_unpatch_takes_the_hooks_back():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)

    def hooks():
        return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]

    before, was = snapshot(model), hooks()
    tokengate.patch(model, ["q_proj", "up_proj"])
    assert hooks() != was
    tokengate.unpatch(model.model.layers[0])
    ids, mask, _, _ = batch("right")
    with tokengate.record(model) as rec:
        model(ids, attention_mask=mask)
    assert {m.positions for m in rec.report().modules.values()} == {13}
    tokengate.unpatch(model)
    assert hooks() == was
    assert snapshot(model) == before
