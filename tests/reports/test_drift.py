"""How far an adapted model is from its base: against loops in float64, over real positions."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import Net, away_from_initialisation, one_sentence, padded_bert, small_llama, snapshot
from torch import nn

import tokengate


def softmax(row):
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def kl(p_logits, q_logits):
    p, q = softmax(p_logits), softmax(q_logits)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def adapted_llama():
    model = tokengate.patch(small_llama(), ["q_proj", "v_proj"], gate=False)
    away_from_initialisation(model, 0.3)
    return model


def logits_of(model, batch):
    with torch.no_grad():
        after = model(**batch).logits.double().tolist()
        with tokengate.disabled(model):
            before = model(**batch).logits.double().tolist()
    return before, after


def padded_ids():
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 64, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = mask[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_language_model_by_the_loop_over_real_positions():
    model, batch = adapted_llama(), padded_ids()
    before, after = logits_of(model, batch)
    each = [
        kl(before[b][t], after[b][t])
        for b in range(3)
        for t in range(7)
        if batch["attention_mask"][b][t]
    ]
    everywhere = [kl(before[b][t], after[b][t]) for b in range(3) for t in range(7)]
    found = tokengate.drift(model, [batch])
    assert float(found) == pytest.approx(np.mean(each), rel=1e-4)
    assert abs(np.mean(everywhere) / np.mean(each) - 1) > 0.01
    assert (found.measure, found.positions) == ("kl", 15)
    assert str(found) == f"kl to the base {found.mean:.4g} nats (15 positions)"
    # Labels do not matter where there is a mask; without one, -100 is what is no token.
    labelled = {**batch, "labels": torch.full((3, 7), -100)}
    assert float(tokengate.drift(model, [labelled])) == float(found)
    del labelled["attention_mask"]
    labelled["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert tokengate.drift(model, [labelled]).positions == 15


def test_batches_weigh_by_their_positions():
    model = adapted_llama()
    one, two = {"input_ids": torch.arange(1, 4)[None]}, {"input_ids": torch.arange(9, 30)[None]}
    apart = [float(tokengate.drift(model, [batch])) for batch in (one, two)]
    assert apart[0] != pytest.approx(apart[1], rel=1e-3)
    together = float(tokengate.drift(model, iter([one, two])))
    assert together == pytest.approx((3 * apart[0] + 21 * apart[1]) / 24)


@pytest.mark.parametrize("gate", [False, "threshold"])
def test_an_untrained_model_is_its_base(gate):
    model = tokengate.patch(small_llama(), ["q_proj"], gate=gate)
    assert float(tokengate.drift(model, [padded_ids()])) == 0.0


@pytest.mark.parametrize("scale", [0.8, 0.25, 0.0])
def test_a_scale_is_a_smaller_modification(scale):
    model, batch = adapted_llama(), padded_ids()
    whole, found = (float(tokengate.drift(model, [batch], scale=s)) for s in (1.0, scale))
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.modification.B.mul_(scale)
    smaller = float(tokengate.drift(model, [batch]))
    assert whole > 1.1 * smaller
    assert found == pytest.approx(smaller, rel=1e-4, abs=1e-12)


def test_features_by_their_cosine():
    model, batch, _ = padded_bert(gate=False)
    model.eval()
    with torch.no_grad():
        after = model(**batch).last_hidden_state
        with tokengate.disabled(model):
            before = model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    wanted = [
        1 - float(a @ b / (a.norm() * b.norm()))
        for a, b in zip(after[real].double(), before[real].double(), strict=True)
    ]
    found = tokengate.drift(model, [batch])
    assert found.mean == pytest.approx(np.mean(wanted), rel=1e-5)
    assert (found.measure, found.positions) == ("cosine", int(real.sum()))
    pooled = tokengate.drift(model, [batch], output=lambda output: output.pooler_output)
    assert (pooled.measure, pooled.positions) == ("cosine", 3)
    assert pooled.mean != found.mean


class Towers(nn.Module):
    """As CLIP: embeddings of pictures and of texts, not as many of the one as of the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.read = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

    def forward(self, pictures, texts):
        towers = {"text_embeds": self.read(texts), "image_embeds": self.seen(pictures)}
        return SimpleNamespace(**towers, text_model_output=None)


@pytest.mark.parametrize("target", ["seen", "read"])
def test_both_towers_count_whichever_is_adapted(target):
    model = away_from_initialisation(tokengate.patch(Towers(), [target], rank=2, gate=False))
    batch = torch.randn(5, 4), torch.randn(3, 4)
    moved = dict(zip(["seen", "read"], batch, strict=True))[target]
    with torch.no_grad():
        layer = model.get_submodule(target)
        after = layer(moved)
        with tokengate.disabled(model):
            apart = 1 - nn.functional.cosine_similarity(after, layer(moved))
    found = tokengate.drift(model, [batch])
    assert found.mean == pytest.approx(float(apart.sum()) / 8, rel=1e-4)
    assert found.mean > 1e-3
    assert (found.measure, found.positions) == ("cosine", 8)


class Predicts(nn.Module):
    """`columns` logits for each sample."""

    def __init__(self, columns):
        super().__init__()
        self.fc = nn.Linear(4, columns)

    def forward(self, x, attention_mask=None):
        return {"logits": self.fc(x)}


@pytest.mark.parametrize(("columns", "measure"), [(3, "kl"), (1, "difference")])
def test_classifiers_and_numbers(columns, measure):
    torch.manual_seed(0)
    model = tokengate.patch(Predicts(columns), ["fc"], gate=False)
    away_from_initialisation(model)
    batch = {"x": torch.randn(5, 4), "attention_mask": torch.ones(5, 9)}  # of tokens within
    with torch.no_grad():
        after = model(**batch)["logits"].tolist()
        with tokengate.disabled(model):
            before = model(**batch)["logits"].tolist()
    by_hand = kl if measure == "kl" else lambda b, a: abs(a[0] - b[0])
    found = tokengate.drift(model, [batch])
    wanted = np.mean([by_hand(b, a) for b, a in zip(before, after, strict=True)])
    assert (found.measure, found.positions) == (measure, 5)
    assert found.mean == pytest.approx(wanted, rel=1e-4)
    assert found.mean > 0


def test_what_the_base_rules_out_adds_nothing_and_what_is_broken_is_seen():
    model = tokengate.patch(Predicts(3), ["fc"], gate=False)
    away_from_initialisation(model)
    batch = {"x": torch.randn(5, 4)}

    def masked(output):
        return output["logits"].index_fill(1, torch.tensor([2]), -torch.inf)

    assert 0 < tokengate.drift(model, [batch], output=masked, measure="kl").mean < math.inf
    nn.init.constant_(model.fc.modification.B, math.nan)
    assert math.isnan(tokengate.drift(model, [batch], output=masked, measure="kl").mean)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_numbers_in_several_columns_are_no_distribution(problem, wrapped):
    torch.manual_seed(0)
    model = Predicts(3)
    model.config = SimpleNamespace(problem_type=problem)
    away_from_initialisation(tokengate.patch(model, ["fc"], gate=False))
    batch = {"x": torch.randn(5, 4)}
    with torch.no_grad():
        after = model(**batch)["logits"]
        with tokengate.disabled(model):
            before = model(**batch)["logits"]
    asked = torch.optim.swa_utils.AveragedModel(model) if wrapped else model
    found = tokengate.drift(asked, [batch])
    assert found.measure == "difference"
    assert found.mean == pytest.approx((after - before).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("output", "measure"),
    [
        (lambda output: output.logits, "kl"),
        (lambda output: output.logits[:, -1], "kl"),
        (lambda output: output.hidden_states[-1], "cosine"),
        (lambda output: output.logits[..., :5], "cosine"),
        (lambda output: output.logits[..., :1], "difference"),
    ],
)
def test_what_output_returns_are_features_but_for_logits_themselves(output, measure):
    model = adapted_llama()
    batch = {**padded_ids(), "output_hidden_states": True}
    found = tokengate.drift(model, [batch], output=output)
    assert found.measure == measure
    assert found == tokengate.drift(model, [batch], output=output, measure=measure)


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_mask_of_a_batch_by_position_counts_as_by_name(kind):
    model, batch = adapted_llama(), padded_ids()
    everywhere = tokengate.drift(model, [{"input_ids": batch["input_ids"]}])
    by_name = tokengate.drift(model, [batch])
    assert (everywhere.positions, by_name.positions) == (21, 15)
    assert tokengate.drift(model, [kind(batch.values())]) == by_name
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert tokengate.drift(averaged, [kind(batch.values())]) == by_name


class Draws(Predicts):
    """Also in evaluation."""

    def forward(self, x):
        return super().forward(x + torch.rand_like(x))


def test_what_a_model_draws_is_no_drift():
    model, batch = tokengate.patch(Draws(3), ["fc"], gate=False), {"x": torch.randn(5, 4)}
    assert not torch.equal(model(**batch)["logits"], model(**batch)["logits"])
    state = torch.get_rng_state()
    assert tokengate.drift(model, [batch]).mean == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def test_plain_tensors_are_features_unless_told_otherwise():
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj"], gate=False)
    away_from_initialisation(model)
    batch = torch.randn(2, 5, 8)
    assert tokengate.drift(model, [batch]).measure == "cosine"
    found = tokengate.drift(model, [batch], measure="KL")
    assert (found.measure, found.positions) == ("kl", 10)


def test_logits_in_another_dtype_are_logits():
    torch.manual_seed(0)
    model = tokengate.patch(Predicts(3).bfloat16(), ["fc"], gate=False)
    away_from_initialisation(model)
    batch = {"x": torch.randn(5, 4, dtype=torch.bfloat16)}
    found = tokengate.drift(model, [batch], output=lambda output: output["logits"].float())
    assert found.measure == "kl"


@pytest.mark.parametrize("measure", ["kl", "cosine"])
def test_outputs_of_one_number_are_no_distributions_and_no_directions(measure):
    """Both were 0, or 2 where a sign changes, whatever else did."""
    model = tokengate.patch(nn.Sequential(nn.Linear(4, 1)), "all-linear", gate=False)
    away_from_initialisation(model)
    batch = torch.randn(6, 4)
    with one_sentence(f"measure='{measure}' was asked of outputs of one number each"):
        tokengate.drift(model, [batch], measure=measure)
    found = tokengate.drift(model, [batch])
    with torch.no_grad(), tokengate.disabled(model):
        base = model(batch)
    assert found.measure == "difference"
    assert found.mean == pytest.approx((model(batch) - base).abs().mean().item(), rel=1e-6)
    assert found.mean > 0


def test_nothing_is_left_behind():
    model = adapted_llama().train()
    batch, before = padded_ids(), snapshot(model)
    state = torch.get_rng_state()
    tokengate.drift(model, [batch], scale=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: tokengate.drift(m, []), "drift was given no batches"),
        (lambda m: tokengate.drift(m, iter(())), "drift was given no batches"),
        (lambda m: tokengate.drift(m, [{"x": torch.randn(0, 4)}]), "no real position"),
        (lambda m: tokengate.drift(m, [{"x": torch.ones(2, 4)}], scale=1.5), r"not in \[0, 1\]"),
        (
            lambda m: tokengate.drift(m, [{"x": torch.ones(2, 4)}], output="logits"),
            "no function of",
        ),
        (lambda m: tokengate.drift(m, [torch.ones(2, 4)], output=lambda: 0), "no function of"),
        (lambda m: tokengate.drift(m, [{"x": torch.randn(2, 4)}], measure="l2"), "measure='l2'"),
        (lambda m: tokengate.drift(m, [{"x": torch.randn(2, 3, 2, 4)}]), "pass output="),
        (
            lambda m: tokengate.drift(
                m, [{"x": torch.randn(2, 3, 4), "attention_mask": torch.ones(2, 5)}]
            ),
            r"shape \(2, 5\) for outputs of shape \(2, 3, 3\)",
        ),
        (lambda m: tokengate.drift(nn.Linear(2, 2), [torch.randn(2, 2)]), "drift"),
        (lambda m: tokengate.drift(m, [{"x": torch.ones(1, 4)}], output=dict), "output"),
    ],
)
def test_refusals(call, message):
    model = tokengate.patch(Predicts(3), ["fc"], gate=False)
    with pytest.raises(tokengate.TokenGateError, match=message):
        call(model)
