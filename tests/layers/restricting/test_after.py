"""tokengate.after: from the last of some tokens on, whatever of the text a cache has."""

import sys
import threading

import pytest
import torch
from models import away_from_initialisation, one_sentence
from restricted_texts import CACHE, INVOKE, ids_with, llama, transformers
from torch import nn

import tokengate

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("ids", [[], "ab", [1.5], [-1], None, [[1]]])
def test_what_are_no_tokens_is_refused(ids):
    with one_sentence("after was given", "ids of one or more tokens"):
        tokengate.after(ids)
