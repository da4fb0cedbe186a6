"""restrict in language models: masks of whole texts, with caches and in `generate`."""

import copy

import pytest
import torch
from models import away_from_initialisation, one_sentence
from restricted_texts import CACHE, INVOKE, ids_with, llama, transformers

import tokengate

pytestmark = pytest.mark.usefixtures("one_thread")


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
