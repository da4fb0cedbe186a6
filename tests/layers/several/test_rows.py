"""An adapter of its own for each row of a batch."""

import pytest
import torch
from models import away_from_initialisation, one_sentence, small_llama, snapshot
from three_adapters import X, alone, fresh, run
from torch import nn

import tokengate
from tokengate import TokenGateError

# Some of the optimisers here move tau by another rule than its own.
pytestmark = pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")


ROWS = [["a", "b", None, "c"], ["b", "b", "b", "b"], [None] * 4, ["c", "a", "c", "a"]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_one_batch_are_what_they_are_apart(model, rows, dtype):
    model, x = model.to(dtype), X.to(dtype)
    expected = torch.cat([
        run((fresh() if name is None else alone(name)).to(dtype), x[i : i + 1])
        for i, name in enumerate(rows)
    ])  # fmt: skip
    if set(rows) != {"a"}:
        assert (run(model, x) - expected).abs().max() > 1e-3
    with tokengate.use(model, rows):
        found = run(model, x)
    assert (found - expected).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.equal(run(model, x), run(alone("a").to(dtype), x))


@pytest.mark.parametrize("in_use", ["a", "b"])
@pytest.mark.parametrize("rows", ROWS[:2] + ROWS[3:])
def test_a_recording_is_of_all_layers_that_a_row_is_modified_in(model, in_use, rows):
    """Whatever is in use around it: a row counts as if it were alone, and what does not modify it
    leaves it alone."""
    apart = []
    for i, name in enumerate(rows):
        closed = {}
        if name is not None:
            single = alone(name)
            with tokengate.record(single) as rec:
                run(single, X[i : i + 1])
            closed = rec.report().by_module
        apart.append(closed)
    names = {name for closed in apart for name in closed}
    expected = {n: sum(closed.get(n, 1.0) for closed in apart) / len(rows) for n in names}
    tokengate.use(model, in_use)
    with tokengate.use(model, rows), tokengate.record(model) as rec:
        run(model)
    found = rec.report().by_module
    called = {name: share for name, share in found.items() if share == share}
    assert called == pytest.approx(expected)
    assert set(found) - set(called) <= set(tokengate.layers(model))  # in use, and not called


def test_a_recording_hears_what_is_put_in_use_within_it(model):
    with tokengate.record(model) as rec, tokengate.use(model, "b"):
        run(model)
    with tokengate.use(model, "b"), tokengate.record(model) as expected:
        run(model)
    found, alone = rec.report().by_module, expected.report().by_module
    assert {name: found[name] for name in alone} == alone


def test_rows_while_another_or_none_is_in_use(model):
    expected = torch.cat([run(alone("a"), X[:2]), run(alone("c"), X[2:])])
    for name in ("b", None):
        with tokengate.use(model, name), tokengate.use(model, ["a", "a", "c", "c"]):
            assert torch.allclose(run(model), expected, atol=1e-5)


def test_rows_have_gradients(model):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    rows = ["a", "b", "c", "a"]
    with tokengate.use(model, rows):
        model(X).square().sum().backward()
    twin = alone("b")
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    twin(X[1:2]).square().sum().backward()
    twin_layer = twin.blocks[0].fc2
    resting = model.blocks[0].fc2.adapter("b")
    for own, other in zip(resting, (twin_layer.modification, twin_layer.gate), strict=True):
        for found, expected in zip(own.parameters(), other.parameters(), strict=True):
            assert expected.grad.abs().max() > 0
            assert torch.allclose(found.grad, expected.grad, atol=1e-5)


def test_rows_of_another_number_are_refused(model):
    with tokengate.use(model, ["a", "b"]):
        with pytest.raises(
            TokenGateError, match=r"2 rows, and a layer was called with 3 .*3, 5, 8"
        ):
            run(model, X[:3])
        # Positions of whatever rows, for all that is known.
        with pytest.raises(TokenGateError, match="2 rows, and a layer was called with 20"):
            run(model.blocks[0].fc1, torch.randn(20, 8))


def test_rows_of_a_batch_that_is_flattened_beside_its_mask():
    """As OPT's feed-forward sees it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.OPTConfig(
        hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
        word_embed_proj_dim=16, max_position_embeddings=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tokengate.patch(transformers.OPTModel(config).eval(), ["fc1"], rank=4)
    ids = torch.randint(3, 40, (2, 6))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        base = model(ids, attention_mask=mask).last_hidden_state
        away_from_initialisation(model)
        own = model(ids, attention_mask=mask).last_hidden_state
        with tokengate.use(model, [None, "default"]):
            found = model(ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(own, base, atol=1e-2)
    assert torch.allclose(found, torch.stack([base[0], own[1]]), atol=1e-5)


def test_rows_of_an_encoder_and_the_beams_of_its_decoder():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=39,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    tokengate.patch(model, ["q", "v", "wi", "lm_head"], rank=4, gate=False)
    away_from_initialisation(model, 1.0)
    ids = torch.randint(3, 38, (2, 6))
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    with torch.no_grad():
        own = model.generate(ids, **beams)
        with tokengate.disabled(model):
            base = model.generate(ids, **beams)
        with tokengate.use(model, [None, "default"]):
            found = model.generate(ids, **beams)
            with one_sentence("2 rows, and a layer was called with 4", "each name as often"):
                model.generate(torch.cat([ids, ids]), **beams)
            with one_sentence("called with 3") as told:
                model.generate(ids[[0, 1, 1]], **beams)
    assert "num_beams" not in told[0]
    assert not torch.equal(own, base)
    assert torch.equal(found, torch.stack([base[0], own[1]]))


def test_rows_and_beams_of_a_decoder_alone():
    pytest.importorskip("transformers", reason="needs transformers")
    model = small_llama()
    tokengate.patch(model, ["q_proj", "v_proj"], rank=4, gate=False)
    away_from_initialisation(model, 0.5)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    own = model.generate(ids, **beams)
    with tokengate.disabled(model):
        base = model.generate(ids, **beams)
    with tokengate.use(model, [None, "default"]), one_sentence("each name as often"):
        model.generate(ids, **beams)
    with tokengate.use(model, [None] * 3 + ["default"] * 3):  # as the sentence says
        found = model.generate(ids, **beams)
    assert not torch.equal(own, base)
    assert torch.equal(found, torch.stack([base[0], own[1]]))


def test_rows_of_routed_experts_are_refused():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)]), "q": nn.Linear(8, 8)})
    tokengate.patch(model, "all-linear")
    with pytest.raises(TokenGateError, match=r"'experts.0' is an expert's"):
        tokengate.use(model, ["default", None])
    tokengate.use(model, None)


def test_rows_after_inference_mode_have_gradients(model):
    with tokengate.use(model, ["a", None, "a", "a"]):
        with torch.inference_mode():
            model(X)
        model(X).sum().backward()
    assert model.blocks[0].fc1.modification.A.grad is not None


def test_the_rows_of_a_language_model_are_served_as_apart(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=60, bos_token_id=1, eos_token_id=59, pad_token_id=0,
    )  # fmt: skip

    def build():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    ids = torch.randint(2, 58, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    single, both = {}, build()
    for seed, name in enumerate(("x", "y"), 1):
        single[name] = tokengate.patch(build(), ["q_proj", "up_proj"], rank=4)
        torch.manual_seed(seed)
        away_from_initialisation(single[name], 1.0)
        for layer in tokengate.layers(single[name]).values():
            layer.gate.tau.data.fill_(3.0)
        tokengate.save(single[name], tmp_path / name)
        tokengate.load(both, tmp_path / name, name=name)
    options = {"max_new_tokens": 6, "do_sample": False}
    rows = ["x", "y", None]
    expected = [
        (build() if name is None else single[name]).generate(
            ids[i : i + 1], attention_mask=mask[i : i + 1], **options
        )
        for i, name in enumerate(rows)
    ]
    with tokengate.use(both, rows), tokengate.record(both) as rec:
        found = both.generate(ids, attention_mask=mask, **options)
    width = max(each.shape[1] for each in expected)
    for row, each in zip(found, expected, strict=True):
        assert row[: each.shape[1]].tolist() == each[0].tolist()
    assert found.shape[1] == width
    assert not torch.equal(found, build().generate(ids, attention_mask=mask, **options))
    assert 0 < rec.report().sparsity < 1


def test_what_is_of_one_adapter_refuses_rows(model, tmp_path):
    with tokengate.use(model, ["a", "b", None, None]):
        before = snapshot(model)
        with pytest.raises(TokenGateError, match="rows have their own adapters"):
            tokengate.calibrate(model, [X])
        assert snapshot(model) == before
    with pytest.raises(TokenGateError, match="cannot be an adapter's"):
        tokengate.save(model, tmp_path, name=["b"])
