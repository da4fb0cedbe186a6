"""tokengate.compare: effects by the reference, padding, what is shown of it."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Net, away_from_initialisation, one_sentence, small_llama, snapshot

import tokengate
from tokengate.reports.effects.effect import effect_of


@given(
    length=st.integers(1, 5), vocabulary=st.integers(1, 4), shift=st.booleans(),
    bits=st.integers(0, 2**10 - 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_effects_are_the_references(length, vocabulary, shift, bits, seed):
    draw = torch.Generator().manual_seed(seed)
    base, new = (
        torch.randn(2, length, vocabulary, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    ids = torch.randint(-1, vocabulary + 1, (2, length), generator=draw)
    real = torch.tensor([bool(bits >> i & 1) for i in range(2 * length)]).reshape(2, length)
    found = effect_of(base, new, ids, real, shift=shift)
    for row in range(2):
        wanted = reference.token_effects(
            *(each[row].tolist() for each in (base, new, ids, real)), shift
        )
        for one, other in zip((found.log_prob, found.kl), wanted, strict=True):
            assert one[row].tolist() == pytest.approx(other, nan_ok=True, abs=1e-12)


def test_many_positions_are_those_of_each():
    base, new, ids = torch.randn(200, 7), torch.randn(200, 7), torch.randint(7, (200,))
    whole = effect_of(base, new, ids)
    assert whole.kl[0].isnan()
    parts = [effect_of(*(each[i : i + 2] for each in (base, new, ids))) for i in range(199)]
    assert torch.equal(whole.kl[1:], torch.stack([part.kl[1] for part in parts]))


def test_what_cannot_be_drawn_adds_nothing():
    masked = torch.tensor([[0.0, 1.0, -math.inf]] * 2)
    other = masked.flip(0) + torch.tensor([1.0, 0.0, 0.0])
    found = effect_of(masked, other, torch.tensor([0, 1]), shift=False)
    assert found.kl.isfinite().all()
    assert (found.kl > 0).all()


def batch(left):
    torch.manual_seed(0)
    ids = torch.randint(1, 64, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0 if left else 1
    mask[1, 4:] = 1 if left else 0
    return {"input_ids": ids, "attention_mask": mask}


def gated_llama():
    model = tokengate.patch(small_llama(), ["q_proj", "v_proj"], rank=2, tau=0.2)
    return away_from_initialisation(model)


@pytest.mark.parametrize("left", [True, False])
def test_a_language_model_beside_its_base(left):
    """Labels shift by one; what padding predicts, and padding itself, has no effect."""
    model, given = gated_llama(), batch(left)
    found = tokengate.compare(model.train(), given)
    assert model.training
    model.eval()
    with torch.no_grad():
        new = model(**given).logits
        with tokengate.disabled(model):
            base = model(**given).logits
    assert not torch.allclose(new, base, atol=1e-3)
    for row in range(2):
        change, kl = reference.token_effects(
            *(e[row].tolist() for e in (base, new, *given.values())), shift=True
        )
        assert found.effect.log_prob[row].tolist() == pytest.approx(change, nan_ok=True, abs=1e-4)
        assert found.effect.kl[row].tolist() == pytest.approx(kl, nan_ok=True, abs=1e-4)
    wanted = [[0], [0, 1, 2, 3] if left else [0, 4, 5, 6]]
    assert [row.isnan().nonzero().flatten().tolist() for row in found.effect.kl] == wanted
    assert (found.effect.kl[0, 1:] > 0).all()


def test_a_tuple_is_what_it_is_by_name():
    """Its tokens were not found, and its padding was not known."""
    model = away_from_initialisation(tokengate.patch(small_llama(), ["q_proj"], rank=2))
    by_name = batch(left=False)
    found, wanted = (tokengate.compare(model, b) for b in (tuple(by_name.values()), by_name))
    assert not wanted.real.all()
    assert torch.equal(found.real, wanted.real)
    torch.testing.assert_close(found.effect.kl, wanted.effect.kl, equal_nan=True)


def test_before_training_nothing_has_changed():
    model = tokengate.patch(small_llama(), ["q_proj"], rank=2)
    before = snapshot(model)
    found = tokengate.compare(model, batch(left=True))
    assert found.effect.kl.nan_to_num().eq(0).all()
    assert found.effect.log_prob.nan_to_num().eq(0).all()
    assert snapshot(model) == before


def test_its_views_have_it_all():
    model, given = gated_llama(), batch(left=True)
    found = tokengate.compare(model, given)
    one, other = found.views(lambda ids: [f"t{i}" for i in ids], ["first"])
    assert (one.title, other.title) == ("first", "")
    assert one.tokens == [f"t{i}" for i in given["input_ids"][0].tolist()]
    assert other.real.tolist() == given["attention_mask"][1].bool().tolist()
    assert one.is_open.keys() == one.ratios.keys() == tokengate.layers(model).keys()
    assert torch.equal(one.kl.nan_to_num(), found.effect.kl[0].nan_to_num())
    assert 0 < found.report.sparsity < 1
    assert "log_prob" in found.report.to_html(texts=[one, other])


def test_a_masked_language_model_predicts_its_own_positions():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=50,
    )  # fmt: skip
    model = tokengate.patch(transformers.BertForMaskedLM(config), ["query"], rank=2)
    given = {"input_ids": torch.randint(1, 50, (1, 6))}
    assert not tokengate.compare(away_from_initialisation(model), given).effect.kl.isnan().any()
    assert tokengate.compare(model, given, shift=True).effect.kl.isnan().sum() == 1


def test_an_encoder_decoder_predicts_its_labels():
    """Its input_ids, be they as many, are other tokens, and so is their mask."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.T5Config(
        d_model=16, d_ff=32, num_heads=2, d_kv=8, num_layers=1, vocab_size=50,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    away_from_initialisation(tokengate.patch(model, ["q", "v"], rank=2))
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    given = {"input_ids": torch.randint(1, 50, (2, 4)), "attention_mask": mask, "labels": labels}
    found = tokengate.compare(model, given)
    model.eval()
    with torch.no_grad():
        new = model(**given).logits.log_softmax(-1)
        with tokengate.disabled(model):
            change = new - model(**given).logits.log_softmax(-1)
    real = labels >= 0
    wanted = change.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert wanted.abs().min() > 1e-3
    torch.testing.assert_close(found.effect.log_prob[real], wanted[real])
    assert found.effect.log_prob[~real].isnan().all()
    assert torch.equal(found.real, real)
    assert torch.equal(found.ids, labels)
    assert [view.tokens[0] for view in found.views(lambda ids: list(map(str, ids)))] == ["5", "8"]
    with one_sentence("no tokens (B, T)", "labels"):
        tokengate.compare(model, {"input_ids": labels[:, :2], "decoder_input_ids": labels[:, :2]})


def test_models_of_another_kind():
    model = tokengate.patch(Net(), ["q_proj"], rank=2)
    x, ids = torch.randn(2, 5, 8), torch.randint(3, (2, 5))
    assert tokengate.compare(model, x, ids=ids).effect.kl.shape == (2, 5)
    assert tokengate.compare(model, (x,), ids=ids, shift=False).effect.kl.isnan().sum() == 0
    with one_sentence("compare", "no tokens (B, T)", "input_ids"):
        tokengate.compare(model, x)
    with one_sentence("base_logits", "(2, 5, 3)", "(2, 4)"):
        tokengate.compare(model, x, ids=ids[:, :4])
    head = torch.nn.Sequential(model, torch.nn.Flatten())
    with one_sentence("compare", "(2, 15)", "language model"):
        tokengate.compare(head, x, ids=ids)
    with one_sentence("compare", "without a patched layer"):
        tokengate.compare(Net(), x, ids=ids)
    with one_sentence("tokenizer", "convert_ids_to_tokens"):
        tokengate.compare(model, x, ids=ids).views("words")
    with one_sentence("views was given 3 titles for 2 samples"):
        tokengate.compare(model, x, ids=ids).views(lambda ids: list(map(str, ids)), "abc")
    with one_sentence("no patched layer saw these 4 texts of 5 tokens"):
        folded = tokengate.compare(model, x, ids=ids)
        type(folded)(ids.repeat(2, 1), folded.real, folded.effect, folded.recorded).views(list)
