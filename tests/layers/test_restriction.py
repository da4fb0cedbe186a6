"""restrict: outside, a layer is the base to the bit, also in the cache; inside it is as ever."""

import contextvars
import copy
import inspect
import sys
import threading

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence, small_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
)
GATES = ["threshold", False, "sigmoid", "random"]
INVOKE = [7, 9]


def net(gate="threshold", method="lora", targets=("q_proj", "fc1"), **options):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), list(targets), method, rank=2, gate=gate, **options)
    return away_from_initialisation(model)


def layer_of(method="lora", gate="threshold", dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=bias).to(dtype)
    tokengate.patch(layer, "all-linear", method, rank=3, gate=gate)
    return away_from_initialisation(layer)


def llama(gate="threshold", dtype=torch.float32, **options):
    model = small_llama().to(dtype)
    tokengate.patch(model, ["q_proj", "k_proj", "v_proj", "up_proj"], rank=4, gate=gate, **options)
    return away_from_initialisation(model, 0.3)


MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]], dtype=torch.bool)


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


def test_threads_share_a_restriction_and_not_what_it_has_seen():
    """Each prompt has its tokens elsewhere; a row of one is never cut as another's."""
    model = llama(gate=False)
    prompts = [ids_with(place, rows=1) for place in (1, 3, 5, 7)]
    shared, wanted = tokengate.restrict(model, tokengate.after(INVOKE)), []
    for ids in prompts:
        with tokengate.restrict(model, tokengate.after(INVOKE)), torch.no_grad():
            wanted.append(model(ids).logits)
    assert not torch.equal(wanted[0], wanted[1])
    wrong = []

    def serve(ids, logits):
        for _ in range(10):
            with shared, torch.no_grad():
                cache = model(ids[:, :9], use_cache=True).past_key_values
                rest = model(ids[:, 9:], **{CACHE: cache}).logits
            if (rest - logits[:, 9:]).abs().max() > 1e-4:
                wrong.append(ids)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=serve, args=pair) for pair in zip(prompts, wanted, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    with shared, shared:  # entered twice, it ends twice
        pass
    ids = prompts[0]
    assert not torch.equal(model(ids).logits, wanted[0])


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


def ids_with(*places, rows=2, length=12):
    """Tokens without INVOKE, but at these places in the first row."""
    ids = torch.randint(10, 64, (rows, length), generator=torch.Generator().manual_seed(3))
    for place in places:
        ids[0, place : place + 2] = torch.tensor(INVOKE)
    return ids


def test_after_is_the_mask_of_the_last_occurrence():
    model, ids = llama(), ids_with(2, 6)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 6:] = True
    with tokengate.restrict(model, mask):
        wanted = model(ids).logits
    with tokengate.restrict(model, tokengate.after(INVOKE)):
        assert torch.equal(model(ids).logits, wanted)
    with tokengate.disabled(model):
        base = model(ids).logits
    assert torch.equal(wanted[1], base[1])
    assert torch.equal(wanted[0, :6], base[0, :6])
    assert not torch.equal(wanted[0, 6:], base[0, 6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_keys_and_values_outside_are_the_base_s(dtype):
    model, ids = llama(dtype=dtype), ids_with(6)
    with tokengate.disabled(model):
        base = model(ids).past_key_values
    with tokengate.restrict(model, tokengate.after(INVOKE)):
        found = model(ids).past_key_values
    free = model(ids).past_key_values
    for ours, theirs, other in zip(found.layers, base.layers, free.layers, strict=True):
        for name in ("keys", "values"):
            one, two = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(one[0, :, :6], two[0, :, :6])
            assert torch.equal(one[1], two[1])
            assert not torch.equal(one[0, :, 6:], two[0, :, 6:])
            assert not torch.equal(getattr(other, name)[0, :, :6], two[0, :, :6])


def test_the_base_s_cache_of_a_prefix_serves_an_adapter():
    model, ids = llama(), ids_with(6, rows=1)
    with torch.no_grad(), tokengate.restrict(model, tokengate.after(INVOKE)):
        whole = model(ids).logits
    with torch.no_grad():
        with tokengate.disabled(model):
            cache = model(ids[:, :6]).past_key_values
        for where in (tokengate.after(INVOKE), torch.arange(12)[None] >= 6):
            with tokengate.restrict(model, where):
                own = model(ids[:, :6], use_cache=True).past_key_values
                rest = model(ids[:, 6:], **{CACHE: copy.deepcopy(cache)}).logits
                again = model(ids[:, 6:], **{CACHE: own}).logits
            assert torch.equal(rest, again)  # to the bit
            # Products of other numbers of rows are rounded otherwise.
            torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-5, atol=1e-5)
        free = model(ids[:, 6:], **{CACHE: cache}).logits
        torch.testing.assert_close(free, whole[:, 6:], rtol=1e-5, atol=1e-5)


HOW = [
    {}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padding"])
def test_generate_goes_on_as_the_prompt_did(how, padded):
    """What a mask of the whole text says gives the same, and so does a loop without a cache."""
    model, ids = llama(gate=False), ids_with(5)
    mask = torch.ones_like(ids)
    if padded:
        ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], 1)
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    inside = torch.zeros_like(ids, dtype=torch.bool)
    inside[0, 5 + 3 * padded :] = True
    with torch.no_grad(), tokengate.restrict(model, tokengate.after(INVOKE)):
        found = model.generate(ids, **given, **how)
    rows = how.get("num_return_sequences", 1)
    with torch.no_grad():
        first = torch.cat([inside[:1], torch.ones(1, 5, dtype=torch.bool)], 1)
        second = torch.cat([inside[1:], torch.zeros(1, 5, dtype=torch.bool)], 1)
        whole = torch.cat([first, second])
        if how.get("use_cache") is False:  # where nothing says that more is to come
            with tokengate.restrict(model, whole), one_sentence("a mask of shape"):
                model.generate(ids, **given, **how)
            alike = found
        else:
            with tokengate.restrict(model, whole):
                alike = model.generate(ids, **given, **how)
        free = model.generate(ids, **given, **how)
        with tokengate.disabled(model):
            base = model.generate(ids, **given, **how)
    assert torch.equal(found, alike)
    assert torch.equal(found[rows:], base[rows:])
    assert not torch.equal(found[:rows], base[:rows]) or not torch.equal(free, base)
    with torch.no_grad(), tokengate.restrict(model, inside[:1].expand(2, -1), new=True):
        assert torch.equal(model.generate(ids, **given, **how)[:rows], found[:rows])
    if how:
        return
    # A loop over tokens that knows of no cache.
    text = ids
    for _ in range(5):
        attended = torch.cat([mask, torch.ones(2, text.shape[1] - ids.shape[1]).long()], 1)
        now = torch.zeros_like(text, dtype=torch.bool)
        now[0, 5 + 3 * padded :] = True
        with torch.no_grad(), tokengate.restrict(model, now):
            logits = model(text, attention_mask=attended, use_cache=False).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text)


def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, vocab_size=32, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    tokengate.patch(model, ["q", "v"], gate=False, rank=2)
    away_from_initialisation(model)
    ids, targets = torch.randint(1, 32, (2, 7)), torch.randint(1, 32, (2, 4))
    encoder = torch.zeros(2, 7, dtype=torch.bool)
    encoder[:, :3] = True
    decoder = torch.zeros(2, 4, dtype=torch.bool)
    masks = {"encoder.*": encoder, "*.EncDecAttention.v": encoder, "*": decoder}
    with tokengate.restrict(model, masks), tokengate.record(model, positions=True) as rec:
        model(input_ids=ids, decoder_input_ids=targets)
    assert len(rec.positions) == 12
    for name, is_open in rec.positions.items():
        of_text = name.startswith("encoder") or name.endswith("EncDecAttention.v")
        assert torch.equal(is_open[0], encoder if of_text else decoder), name
    with (
        tokengate.restrict(model, encoder),
        one_sentence("a mask of shape (2, 7)", "positions of shape (2, 4)", "decoder"),
    ):
        # With a cache, which transformers began to leave out, it would be of what is to come, too.
        model(input_ids=ids, decoder_input_ids=targets, use_cache=False)
    with torch.no_grad():
        with tokengate.disabled(model):
            base = model.generate(ids, max_new_tokens=4, do_sample=False)
        with tokengate.restrict(
            model, {"encoder.*": encoder & False, "*EncDec*v": encoder & False, "*": decoder}
        ):
            found = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, base)  # no position of either is inside


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


@pytest.mark.parametrize("ids", [[], "ab", [1.5], [-1], None, [[1]]])
def test_what_are_no_tokens_is_refused(ids):
    with one_sentence("after was given", "ids of one or more tokens"):
        tokengate.after(ids)


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (3, 5), (2, 5, 1)])
def test_a_mask_that_fits_no_call_is_an_error_with_both_shapes(shape):
    model, x = net(), torch.randn(2, 5, 8)
    mask = torch.ones(shape, dtype=torch.bool)
    with tokengate.restrict(model, mask), one_sentence(str(shape), "(2, 5)", "blocks.0.q_proj"):
        model(x)


@pytest.mark.parametrize("cached", [True, False])
def test_a_mask_goes_on_only_with_what_it_fitted(cached):
    model = llama()
    ids, mask = torch.randint(1, 64, (1, 12)), torch.ones(1, 6, dtype=torch.bool)
    longer = ids if cached else ids[:, :8]
    with tokengate.restrict(model, mask):
        model(ids[:, :6], use_cache=cached)
        if not cached:
            model(ids[:, :7], use_cache=False)  # the next token, of a generation without a cache
            model(ids[:, :8], use_cache=False)
            model(ids[:, :6], use_cache=False)
        with one_sentence("(1, 6)", f"(1, {longer.shape[1]})"):
            model(longer, use_cache=cached)


@pytest.mark.skipif(CACHE != "cache", reason="of a state that tells whether it is one")
@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_a_state_without_a_length_is_as_long_as_what_was_seen(kind):
    """State-space models keep no positions, so that their cache cannot tell how many it has."""
    sizes = {"num_heads": 8, "head_dim": 8, "n_groups": 2} if kind == "Mamba2" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, **sizes
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    away_from_initialisation(tokengate.patch(model, ["in_proj"], rank=4, gate=False))
    ids = torch.randint(3, 64, (2, 8))
    ids[0, 4:6], ids[1, 2:4] = torch.tensor(INVOKE), torch.tensor(INVOKE)
    mask = torch.arange(8).expand(2, 8) > torch.tensor([[5], [2]])
    new = torch.zeros(2, 5, dtype=torch.bool)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    cases = [(tokengate.after(INVOKE), {}, tokengate.after(INVOKE))]
    cases += [(mask, {"new": value}, torch.cat([mask, new | value], 1)) for value in (True, False)]
    for where, kept, whole in cases:
        with tokengate.restrict(model, where, **kept):
            made = model.generate(ids, **options, return_dict_in_generate=True)
        with torch.no_grad(), tokengate.restrict(model, whole):
            wanted = model(made.sequences).logits[:, 7:-1]
        torch.testing.assert_close(torch.stack(made.logits, 1), wanted, rtol=0, atol=1e-5)
        with torch.no_grad():
            free = model(made.sequences).logits[:, 7:-1]
        assert (free - wanted).abs().max() > 1e-4
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        with tokengate.restrict(model, mask), one_sentence("DynamicCache", "within this context"):
            model(ids[:, :1], cache=cache)


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


def regional(tmp_path, gate="threshold", method="lora"):
    """A model with the adapters "a" and "b", and what each of them alone computes in a layer."""
    model = net(gate, method)
    for name in ("a", "b"):
        away_from_initialisation(model, 0.3 if name == "a" else 0.6)
        tokengate.save(model, tmp_path / name)
    for name in ("a", "b"):
        tokengate.load(model, tmp_path / name, name=name)
    return model


@pytest.mark.parametrize("method", ["lora", "dora", "adapter"])
@pytest.mark.parametrize("gate", ["threshold", False])
def test_two_adapters_each_at_its_own_positions(tmp_path, gate, method):
    model, x = regional(tmp_path, gate, method), torch.randn(2, 5, 8)
    layer = model.blocks[0].fc1
    other = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    with tokengate.disabled(model):
        base = layer(x)
    alone = {}
    for name in ("a", "b"):
        with tokengate.use(model, name):
            alone[name] = layer(x)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    with tokengate.use(model, {"a": MASK, "b": other}), tokengate.record(model) as rec:
        h = layer(x)
    assert torch.equal(h[~MASK & ~other], base[~MASK & ~other])
    for name, where in (("a", MASK & ~other), ("b", other & ~MASK)):
        torch.testing.assert_close(h[where], alone[name][where])
    both = MASK & other
    assert both.any()
    torch.testing.assert_close(h[both], (alone["a"] + alone["b"] - base)[both])
    assert rec.report().modules["blocks.0.fc1"].positions == 10
    with tokengate.use(model, {"a": MASK, "b": other}), tokengate.restrict(model, other):
        h = layer(x)
    assert torch.equal(h[~other], base[~other])
    torch.testing.assert_close(h[both], (alone["a"] + alone["b"] - base)[both])


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_regions_are_trained_through(tmp_path, reentrant):
    model, x = regional(tmp_path), torch.randn(2, 5, 8, requires_grad=True)
    with tokengate.use(model, {"a": MASK, "b": ~MASK}):
        h = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        h.square().sum().backward()
    found = x.grad.clone()
    x.grad = None
    with tokengate.use(model, {"a": MASK, "b": ~MASK}):
        model(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    x.grad = None
    with tokengate.use(model, "a"):
        model(x).square().sum().backward()
    assert (found - x.grad).abs().max() > 1e-3


def test_what_is_no_region_of_an_adapter_is_refused(tmp_path):
    model, x = regional(tmp_path), torch.randn(2, 5, 8)
    for wrong, words in (
        ({"c": MASK}, "'c'"), ({"a": 3}, "use was given 3"), ({}, "no names"),
        ({"a": torch.full((2, 5), 2.0)}, "outside [0, 1]"),
    ):  # fmt: skip
        with one_sentence(words):
            tokengate.use(model, wrong)
    with tokengate.use(model, {"a": MASK[:, :4]}), one_sentence("(2, 4)", "(2, 5)", "q_proj"):
        model(x)


@pytest.mark.parametrize("how", ["chunks", "cropped", "interleaved", "head"])
def test_after_knows_the_text_of_each_cache(how):
    """Whatever is run in between, a cached call is what one forward of the whole text is."""
    model, ids = llama(gate=False), ids_with(4, rows=1)
    if how == "head":
        tokengate.patch(model, ["lm_head"], rank=4, gate=False)
        away_from_initialisation(model, 0.3)
    with torch.no_grad(), tokengate.restrict(model, tokengate.after(INVOKE)):
        whole = model(ids, use_cache=False).logits
        cache = transformers.DynamicCache()
        found = []
        cuts = {
            "chunks": [5, 9, 12],
            "cropped": [8, 11],
            "interleaved": [8, 12],
            "head": [8, 9, 12],
        }
        start = 0
        for end in cuts[how]:
            found.append(model(ids[:, start:end], **{CACHE: cache}).logits)
            start = end
            if how == "interleaved":
                model(torch.randint(10, 64, (1, 5)), use_cache=False)
        if how == "cropped":
            cache.crop(-3)
            found = [found[0], model(ids[:, 8:], **{CACHE: cache}).logits]
    with torch.no_grad(), tokengate.disabled(model):
        base = model(ids, use_cache=False).logits
    assert (whole - base)[:, 4:].abs().max() > 0.05
    if how == "chunks":
        # The first of its tokens was the base's, when it was not yet known as one of them.
        assert (torch.cat(found, 1) - base)[:, 5:].abs().max() > 0.05
    else:
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)


class Summing(nn.Module):
    """With a cache as models had before there were classes of them: a tuple, of sums so far."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(64, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        h = self.fc(self.embedding(input_ids)).cumsum(1)
        h = h if past_key_values is None else h + past_key_values[0]
        return h, (h[:, -1:],)


def test_after_knows_the_text_of_a_cache_that_is_a_tuple():
    torch.manual_seed(0)
    model = away_from_initialisation(tokengate.patch(Summing(), ["fc"], gate=False), 0.3)
    ids, cache, found = ids_with(4), None, []
    with torch.no_grad(), tokengate.restrict(model, tokengate.after(INVOKE)):
        whole, _ = model(ids)
        for start, end in ((0, 8), (8, 9), (9, 12)):
            h, cache = model(ids[:, start:end], torch.ones(2, end), cache, use_cache=True)
            found.append(h)
    with torch.no_grad(), tokengate.disabled(model):
        base, _ = model(ids)
    assert torch.equal(whole[:, :4], base[:, :4])
    assert ((whole - base)[0, 8:].abs().amax(-1) > 0.05).all()
    torch.testing.assert_close(torch.cat(found, 1), whole)


def test_after_does_not_guess_and_does_not_look_into_padding():
    model, ids = llama(gate=False), ids_with(4)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        with (
            tokengate.restrict(model, tokengate.after(INVOKE)),
            one_sentence("not seen in this context"),
        ):
            model(ids[:, 8:], **{CACHE: cache})
        padded = torch.cat([ids, torch.tensor([INVOKE, INVOKE])], 1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 2, dtype=torch.long)], 1)
        with tokengate.restrict(model, tokengate.after(INVOKE)):
            wanted = model(ids).logits
            found = model(padded, attention_mask=mask).logits[:, :12]
            other = model(padded).logits[:, :12]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (other - wanted).abs().max() > 0.05


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
