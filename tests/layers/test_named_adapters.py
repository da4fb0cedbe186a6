"""Several adapters on one model: one in use, or one for each row of a batch."""

import copy
import pickle
import sys

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence, small_llama, snapshot
from torch import nn

import tokengate
from tokengate import Slices, TokenGateError
from tokengate.layers import using
from tokengate.layers.named_adapters import put_in_use
from tokengate.layers.patched import all_layers

# Some of the optimisers here move tau by another rule than its own.
pytestmark = pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
# Of each adapter its targets, method and options; they overlap in fc1.
KINDS = {
    "a": (["q_proj", "fc1"], "lora", {"rank": 3}),
    "b": (["fc1", "fc2"], "dora", {"rank": 2}),
    "c": (["v_proj", "fc1"], "adapter", {"rank": 4, "gate": False}),
}


def fresh():
    torch.manual_seed(0)
    return Net()


def alone(name, seed=0):
    """A model with one of them and no other."""
    targets, method, options = KINDS[name]
    model = tokengate.patch(fresh(), targets, method=method, **options)
    torch.manual_seed(ord(name))
    away_from_initialisation(model)
    for layer in tokengate.layers(model).values():
        if layer.gate is not None:
            layer.gate.tau.data.fill_(0.4)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each of them, saved."""
    found = {}
    for name in KINDS:
        found[name] = tmp_path_factory.mktemp(name)
        tokengate.save(alone(name), found[name])
    return found


@pytest.fixture
def model(folders):
    """All of them on one model, "a" in use."""
    model = fresh().eval()
    for name, folder in folders.items():
        tokengate.load(model, folder, name=name)
    return model


def run(model, x=X):
    with torch.no_grad():
        return model(x)


def test_each_is_what_it_is_alone(model):
    expected = {name: run(alone(name)) for name in KINDS}
    assert not torch.equal(expected["a"], expected["b"])
    assert torch.equal(run(model), expected["a"])
    for name in ("b", "c", "a", "c", "b"):
        tokengate.use(model, name)
        assert torch.equal(run(model), expected[name])
        assert list(tokengate.layers(model)) == list(tokengate.layers(alone(name)))
    tokengate.use(model, None)
    assert torch.equal(run(model), run(fresh()))
    assert tokengate.layers(model) == {}


def test_a_context_gives_back_what_was_in_use(model):
    before = snapshot(model)
    with tokengate.use(model, "b"):
        assert torch.equal(run(model), run(alone("b")))
        with tokengate.use(model, ["c", None, "a", "b"]):
            assert not torch.equal(run(model), run(alone("b")))
        with pytest.raises(RuntimeError, match="elsewhere"), tokengate.use(model, ["c", None]):
            raise RuntimeError("elsewhere")
        assert torch.equal(run(model), run(alone("b")))
        with tokengate.use(model, None):
            assert torch.equal(run(model), run(fresh()))
    after = snapshot(model)
    for state in (before, after):
        state.pop("attributes")  # that it was used once
    assert before == after


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


def test_further_layers_are_of_the_adapter_in_use(folders):
    model = fresh()
    tokengate.load(model, folders["a"], name="a")
    tokengate.patch(model, ["fc2"])
    assert "blocks.0.fc2" in tokengate.layers(model)
    tokengate.use(model, None)
    with pytest.raises(TokenGateError, match=r"patch was asked of a model none of whose"):
        tokengate.patch(model, ["v_proj"])
    tokengate.use(model, "a")
    assert "blocks.0.fc2" in tokengate.layers(model)


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


def test_only_what_is_in_use_is_trained(model):
    def trainable():
        return {id(p) for p in model.parameters() if p.requires_grad}

    first = trainable()
    assert first == {
        id(p)
        for layer in tokengate.layers(model).values()
        for part in (layer.modification, layer.gate)
        for p in part.parameters()
    }
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(X).square().mean().backward()
    optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert not any("adapters" in name for name in changed)
    tokengate.use(model, "b")
    assert not trainable() & first
    model.blocks[0].fc2.modification.A.requires_grad_(False)
    tokengate.use(model, "a")
    assert trainable() == first
    tokengate.use(model, "b")
    assert not model.blocks[0].fc2.modification.A.requires_grad
    assert model.blocks[0].fc2.modification.B.requires_grad


def test_each_can_be_saved_and_replaced(model, folders, tmp_path):
    tokengate.save(model, tmp_path / "c", name="c")
    other = fresh().eval()
    tokengate.load(other, tmp_path / "c")
    assert torch.equal(run(other), run(alone("c")))
    assert torch.equal(run(model), run(alone("a")))
    with tokengate.use(model, "b"), torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.modification.B.mul_(3)
        assert not torch.equal(run(model), run(alone("b")))
    tokengate.load(model, folders["b"], name="b")
    assert torch.equal(run(model), run(alone("a")))
    tokengate.use(model, "b")
    assert torch.equal(run(model), run(alone("b")))
    with pytest.raises(TokenGateError, match=r"does not fit.*'blocks.0.q_proj'"):
        tokengate.load(model, folders["a"], name="b")


def test_what_patch_adds_is_called_default(folders):
    model = alone("a")
    tokengate.load(model, folders["b"], name="b")
    assert torch.equal(run(model), run(alone("a")))
    tokengate.use(model, "b")
    assert torch.equal(run(model), run(alone("b")))
    tokengate.use(model, "default")
    assert torch.equal(run(model), run(alone("a")))


def test_slices_have_several_too(tmp_path):
    def build(name):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24))
        if name:
            slices = {"0": Slices(q=8, k=8, v=8)}
            tokengate.patch(model, [f"0.{part}" for part in name], slices=slices)
            torch.manual_seed(len(name))
            away_from_initialisation(model)
        return model

    both = build("")
    for name in ("q", "qv"):
        tokengate.save(build(name), tmp_path / name)
        tokengate.load(both, tmp_path / name, name=name)
    for name in ("qv", "q", "qv"):
        tokengate.use(both, name)
        assert torch.equal(run(both), run(build(name)))
    with tokengate.use(both, ["q", None, "qv", "q"]):
        expected = torch.stack(
            [run(build(n or ""), X)[i] for i, n in enumerate(["q", None, "qv", "q"])]
        )
        assert torch.allclose(run(both), expected, atol=1e-6)
    tokengate.use(both, "q")
    tokengate.unpatch(both, name="qv")
    assert list(tokengate.layers(both)) == ["0.q"]
    assert not hasattr(both[0], "v")
    assert torch.equal(run(both), run(build("q")))


def test_unpatch_and_disabled_know_all_of_them(model):
    base = snapshot(fresh().eval())
    with tokengate.use(model, ["a", "b", None, "c"]), tokengate.disabled(model):
        assert torch.equal(run(model), run(fresh()))
    tokengate.use(model, "b")
    tokengate.unpatch(model)
    found = snapshot(model)
    for key in ("values", "attributes"):
        assert found[key] == base[key]
    assert [kind for _, kind, _ in found["modules"].values()] == [
        kind for _, kind, _ in base["modules"].values()
    ]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_one_of_several_is_taken_out(model, folders, gone, tmp_path):
    base = snapshot(fresh().eval())
    left = [name for name in KINDS if name != gone]
    tokengate.use(model, left[0])
    before, modules = {id(p) for p in model.parameters()}, list(model.modules())
    with tokengate.use(model, gone):
        own = {
            id(p)
            for layer in tokengate.layers(model).values()
            for part in (layer.modification, layer.gate)
            if part is not None
            for p in part.parameters()
        }
    assert tokengate.unpatch(model, name=gone) is model
    assert {id(p) for p in model.parameters()} == before - own
    kept = sum(len(alone(name).state_dict()) - len(base["values"]) for name in left)
    assert len(model.state_dict()) == len(base["values"]) + kept
    for name in left:
        tokengate.use(model, name)
        assert torch.equal(run(model), run(alone(name)))
        assert list(tokengate.layers(model)) == list(tokengate.layers(alone(name)))
    with tokengate.use(model, [None, *left, None]):
        assert torch.equal(run(model)[0], run(fresh())[0])
    # What it alone has modified is as it was.
    wanted = set().union(*(tokengate.layers(alone(name)) for name in left))
    assert all_layers(model).keys() == wanted
    gone_from = [m for m in modules if type(m) is nn.Linear]
    assert not any(hasattr(m, "adapters") or hasattr(m, "_adapters") for m in gone_from)
    # It can come again.
    tokengate.load(model, folders[gone], name=gone)
    tokengate.use(model, gone)
    assert torch.equal(run(model), run(alone(gone)))
    tokengate.save(model, tmp_path)
    other = fresh().eval()
    tokengate.load(other, tmp_path)
    assert torch.equal(run(other), run(alone(gone)))
    tokengate.unpatch(model)
    assert snapshot(model)["values"] == base["values"]
    assert not any("tokengate" in key for m in model.modules() for key in vars(m))


def test_the_last_that_is_left_is_folded_and_undone(model):
    """Whoever is alone stands where one that was never beside others does."""
    tokengate.use(model, "c")
    for name in ("a", "b"):
        tokengate.unpatch(model, name=name)
    before, expected = snapshot(model), run(alone("c"))
    folding = tokengate.fold(model, [X])
    assert torch.allclose(run(model), expected, atol=1e-5)
    folding.undo()
    assert torch.equal(run(model), expected)
    after = snapshot(model)
    for state in (before, after):
        state.pop("attributes")
    assert before == after


def refused_to_take(model, name, *words):
    before = snapshot(model)
    with one_sentence(*words):
        tokengate.unpatch(model, name=name)
    assert snapshot(model) == before


def test_who_is_needed_is_not_taken_out(model):
    refused_to_take(model, "d", "'d'", "'a', 'b', 'c'")
    refused_to_take(model, 3, "3", "'a', 'b', 'c'")
    refused_to_take(model, "a", "in use")
    for used in ("b", ["b", None, None, None], {"b": torch.ones(4, 5).bool()}):
        with tokengate.use(model, used):
            refused_to_take(model, "b", "in use")
            refused_to_take(model, "a", "in use")  # by the model
    refused_to_take(fresh(), "a", "none")
    refused_to_take(alone("a"), "default", "no other", "unpatch(model)")
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3, s=1e-3))
    schedule = tokengate.SparsitySchedule(model, optimizer, target=0.5, total_steps=9)
    tokengate.use(model, "b")
    refused_to_take(model, "a", "SparsitySchedule", "'blocks.0.q_proj'", "detach()")
    schedule.detach()
    tokengate.unpatch(model, name="a")
    with pytest.raises(TokenGateError, match="name='b'"):
        tokengate.unpatch(model, adapter_name="b")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own(model, copied):
    twin = copied(model)
    tokengate.use(twin, "b")
    with torch.no_grad():
        for layer in tokengate.layers(twin).values():
            layer.modification.B.mul_(3)
    assert not torch.equal(run(twin), run(alone("b")))
    assert torch.equal(run(model), run(alone("a")))
    with tokengate.use(model, "b"):
        assert torch.equal(run(model), run(alone("b")))


def test_casts_and_modes_reach_what_rests(model):
    model.to(torch.float64).train()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    tokengate.use(model, "b")
    assert all(m.training for m in model.modules())


def test_nothing_is_made_or_copied_by_a_switch(model):
    def everything():
        return sorted(id(p) for p in model.parameters())

    before = everything()
    for name in ("b", "c", None, "a"):
        tokengate.use(model, name)
        assert everything() == before


def test_bad_input_is_refused(model, folders, tmp_path):
    before = snapshot(model)

    def refused(match, name):
        with pytest.raises(TokenGateError, match=match):
            tokengate.use(model, name)
        assert snapshot(model) == before

    refused("'d', and the model's adapters are 'a', 'b', 'c'", "d")
    refused("'d', and", ["a", "d"])
    refused("given 3, and", [3])
    refused("no names", [])
    for name in ("", "a.b", "items", 3):
        with pytest.raises(TokenGateError, match="cannot be an adapter's"):
            tokengate.load(model, folders["a"], name=name)
    with pytest.raises(TokenGateError, match="without a patched layer"):
        tokengate.use(Net(), "a")
    with pytest.raises(TokenGateError, match="several adapters"):
        tokengate.fold(model, [X])
    tokengate.use(model, None)
    with pytest.raises(TokenGateError, match="none of whose adapters is in use"):
        tokengate.param_groups(model, lr=0.1)


def test_parameters_beside_the_layers_are_one_adapters(folders, tmp_path):
    model = alone("a")
    head = tokengate.patch(fresh(), ["fc1"], train=["head"])
    with torch.no_grad():
        head.head.weight.mul_(2)
    tokengate.save(head, tmp_path)
    before = snapshot(model)
    with pytest.raises(TokenGateError, match=r"'head.weight', which is not one layer's"):
        tokengate.load(model, tmp_path, name="b")
    assert snapshot(model) == before
    with torch.no_grad():
        model.head.weight.mul_(2)
    tokengate.load(model, tmp_path, name="b")


@pytest.mark.parametrize("used", ["default", ["default"] * 4])
@pytest.mark.parametrize("away", ["unpatch", "fold"])
def test_layers_may_become_plain_within_the_context(used, away):
    model = tokengate.patch(fresh(), ["fc1"], gate=False)
    with tokengate.use(model, used):
        tokengate.unpatch(model) if away == "unpatch" else tokengate.fold(model, [X])
    assert all(type(block.fc1) is nn.Linear for block in model.blocks)
    assert not any(hasattr(block.fc1, "_adapters") for block in model.blocks)


def test_what_is_assigned_while_out_of_use_is_trained_in_use(model):
    tokengate.use(model, "b")
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    tokengate.use(model, "a")
    model.load_state_dict({n: v.clone() for n, v in model.state_dict().items()}, assign=True)
    tokengate.use(model, "b")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted


def test_rows_after_inference_mode_have_gradients(model):
    with tokengate.use(model, ["a", None, "a", "a"]):
        with torch.inference_mode():
            model(X)
        model(X).sum().backward()
    assert model.blocks[0].fc1.modification.A.grad is not None


def test_what_is_of_one_adapter_refuses_rows(model, tmp_path):
    with tokengate.use(model, ["a", "b", None, None]):
        before = snapshot(model)
        with pytest.raises(TokenGateError, match="rows have their own adapters"):
            tokengate.calibrate(model, [X])
        assert snapshot(model) == before
    with pytest.raises(TokenGateError, match="cannot be an adapter's"):
        tokengate.save(model, tmp_path, name=["b"])


def test_an_interrupted_use_is_none(model, monkeypatch):
    before, calls = snapshot(model), []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put_in_use(*args, **options)

    monkeypatch.setattr(using, "put_in_use", interrupted)
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    tokengate.use(model, "b")  # takes effect when the object goes, where nothing can be raised
    assert [each.exc_type for each in unraisable] == [KeyboardInterrupt]
    assert snapshot(model) == before
    assert torch.equal(run(model), run(alone("a")))
