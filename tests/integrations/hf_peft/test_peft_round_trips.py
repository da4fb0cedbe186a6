"""Adapters of Hugging Face PEFT, in both directions: equal outputs."""

import copy
import warnings

import pytest
import torch
from drawing import many
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import away_from_initialisation, one_sentence
from peft_adapters import (
    IDS,
    METHODS,
    MODELS,
    QUIET,
    TARGETS,
    TOLERANCE,
    base_of,
    bert,
    close,
    config_of,
    gpt2,
    llama,
    loaded_by_peft,
    logits,
    peft,
    saved_by_peft,
)
from safetensors.torch import load_file
from torch import nn

import tokengate
from tokengate.integrations.hf_peft import export_peft, import_peft

pytestmark = QUIET


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MODELS)
def test_import(tmp_path, make, method, dtype):
    base = base_of(make, dtype)
    heads = ["classifier"] if make is bert else None
    theirs = saved_by_peft(base, tmp_path, method, TARGETS[make], modules_to_save=heads)
    expected = logits(loaded_by_peft(base, tmp_path))
    assert torch.equal(expected, logits(theirs))
    for gate in (True, False):
        ours = copy.deepcopy(base)
        assert import_peft(ours, tmp_path, gate=gate, penalty=0.25) == {}
        assert (logits(ours) - logits(base)).abs().max() > 1e-2
        close(logits(ours), expected, dtype)
        gates = [layer.gate for layer in tokengate.layers(ours).values()]
        assert all(g is None or (g.tau.item(), g.penalty) == (0, 0.25) for g in gates)
        assert all((g is not None) == gate for g in gates)
        trained = {n for n, p in ours.named_parameters() if p.requires_grad}
        rest = {n for n in trained if ".modification." not in n and ".gate." not in n}
        assert rest == ({"classifier.weight", "classifier.bias"} if heads else set())


@pytest.mark.parametrize("order", [("x", "y"), ("y", "x")])
@pytest.mark.parametrize("make", MODELS)
def test_import_of_several(tmp_path, make, order):
    """Beside each other, by name, with layers that only one of them modifies."""
    base, ours = base_of(make), base_of(make)
    saved_by_peft(base, tmp_path / "x", "lora", TARGETS[make])
    saved_by_peft(base, tmp_path / "y", "dora", TARGETS[make][:1])
    for name in order:
        import_peft(ours, tmp_path / name, name=name)
    expected = {n: logits(loaded_by_peft(base_of(make), tmp_path / n)) for n in order}
    for name in order:
        with tokengate.use(ours, name):
            close(logits(ours), expected[name], torch.float64)
    with tokengate.use(ours, ["x", "y"]):
        rows = torch.stack([expected["x"][0], expected["y"][1]])
        close(logits(ours), rows, torch.float64)
    for name in ("y", None):
        with one_sentence("patched already", "name="):
            import_peft(ours, tmp_path / "y", name=name)
    with pytest.raises(tokengate.TokenGateError, match="did you mean name='y'"):
        import_peft(ours, tmp_path / "y", adapter_name="y")
    tokengate.unpatch(ours)
    close(logits(ours), logits(base_of(make)), torch.float64)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MODELS)
def test_export(tmp_path, make, method, dtype):
    base = base_of(make, dtype)
    ours = copy.deepcopy(base)
    train = ["classifier"] if make is bert else []
    tokengate.patch(ours, TARGETS[make], method, rank=3, dropout=0.1, tau=-0.5, train=train)
    away_from_initialisation(ours)
    if train:
        nn.init.normal_(ours.classifier.weight)
    export_peft(ours, tmp_path)
    assert config_of(tmp_path)["lora_dropout"] == 0.1
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    close(logits(loaded_by_peft(base, tmp_path)), logits(ours), dtype)
    # And back.
    again = copy.deepcopy(base)
    import_peft(again, tmp_path, tau=-0.5)
    close(logits(again), logits(ours), dtype)
    for (name, value), (_, other) in zip(
        ours.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MODELS)
def test_a_16_bit_base(tmp_path, make, method, dtype):
    """What was trained is kept in float32; outputs agree as the base's own dtype allows."""
    base = base_of(make, dtype)
    train = ["classifier"] if make is bert else []
    ours = tokengate.patch(copy.deepcopy(base), TARGETS[make], method, rank=3, tau=-1, train=train)
    away_from_initialisation(ours, 0.3)
    export_peft(ours, tmp_path)
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        assert value.dtype == (dtype if "classifier" in key else torch.float32), key
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    expected = logits(theirs)
    change = (expected - logits(base)).norm()
    assert (logits(ours) - expected).norm() < 0.2 * change
    # Without the rounding of every layer's output, in the same values.
    twin = copy.deepcopy(base).float()
    import_peft(twin, tmp_path)
    wide = peft.PeftModel.from_pretrained(copy.deepcopy(base).float(), tmp_path).eval()
    close(logits(twin), logits(wide), torch.float32)
    # As PEFT saves it, adapters in float32 and in the base's dtype.
    for wide_adapters in (True, False):
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, autocast_adapter_dtype=wide_adapters
        ).eval()
        theirs.save_pretrained(tmp_path / "b")
        again = copy.deepcopy(base)
        import_peft(again, tmp_path / "b", tau=-1)
        values = [p for layer in tokengate.layers(again).values() for p in layer.parameters()]
        assert {p.dtype for p in values if p.requires_grad} == {torch.float32}
        for (name, value), (_, other) in zip(
            ours.state_dict().items(), again.state_dict().items(), strict=True
        ):
            narrow = value if wide_adapters or "tau" in name else value.to(dtype).to(value.dtype)
            assert torch.equal(other, narrow), name


@pytest.mark.parametrize("method", METHODS)
def test_from_peft_and_back_is_the_same_file(tmp_path, method):
    base = base_of(bert)
    options = {"task_type": "SEQ_CLS", "lora_dropout": 0.2}
    saved_by_peft(base, tmp_path / "a", method, ["query", "value"], **options)
    ours = copy.deepcopy(base)
    import_peft(ours, tmp_path / "a")
    export_peft(ours, tmp_path / "b", task_type="SEQ_CLS", base_model_name="some/bert")
    before, after = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    close(logits(loaded_by_peft(base, tmp_path / "b")), logits(ours))
    config = config_of(tmp_path / "b")
    assert config["base_model_name_or_path"] == "some/bert"
    assert config["lora_alpha"] == pytest.approx(6, rel=1e-15)


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match.*'proj':RuntimeWarning")
def test_ranks_and_alphas_by_pattern(tmp_path):
    """With keys that match several layers, of which the first counts, and rsLoRA."""
    base = base_of(llama)
    for rslora in (False, True):
        saved_by_peft(
            base, tmp_path, "lora", TARGETS[llama], use_rslora=rslora,
            rank_pattern={r"layers\.1\..*q_proj": 5, "q_proj": 2, "v_proj": 3, "proj": 7},
            alpha_pattern={"^model.layers.0.self_attn.q_proj": 1, "self_attn.v_proj": 9},
        )  # fmt: skip
        ours = copy.deepcopy(base)
        import_peft(ours, tmp_path)
        ranks = [layer.modification.rank for layer in tokengate.layers(ours).values()]
        assert ranks == [2, 3, 4, 5, 3, 4]
        expected = logits(loaded_by_peft(base, tmp_path))
        assert (expected - logits(base)).abs().max() > 1e-2
        close(logits(ours), expected)
        export_peft(ours, tmp_path / "b")
        close(logits(loaded_by_peft(base, tmp_path / "b")), expected)
        # The scale counts, also where it is no longer what alpha gave.
        for layer in tokengate.layers(ours).values():
            layer.modification.scale *= 2
        export_peft(ours, tmp_path / "b")
        assert (logits(ours) - expected).abs().max() > 1e-2
        close(logits(loaded_by_peft(base, tmp_path / "b")), logits(ours))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_layer_whose_scale_was_set_to_0(tmp_path, method):
    base = base_of(llama)
    saved_by_peft(base, tmp_path, method)
    ours = copy.deepcopy(base)
    import_peft(ours, tmp_path)
    before = logits(ours)
    next(iter(tokengate.layers(ours).values())).modification.scale = 0.0
    assert (logits(ours) - before).abs().max() > 1e-3
    export_peft(ours, tmp_path / "b")
    close(logits(loaded_by_peft(base, tmp_path / "b")), logits(ours))


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": r".*\.1\..*v_proj"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": r".*layers\.\d\.self_attn\.[qk]_proj"},
        {"target_modules": "all-linear"},
        {"bias": "none", "init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_targets_as_peft_matches_them(tmp_path, options):
    base = base_of(llama)
    saved_by_peft(base, tmp_path, targets=options.pop("target_modules", TARGETS[llama]), **options)
    ours = copy.deepcopy(base)
    import_peft(ours, tmp_path)
    expected = logits(loaded_by_peft(base, tmp_path))
    assert (expected - logits(base)).abs().max() > 1e-2
    close(logits(ours), expected)


@pytest.mark.parametrize("how", ["orthogonal", "mica", "eva"])
def test_initialisations_that_leave_the_base_alone(tmp_path, how):
    base = base_of(llama, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EVA would like to be given data
        saved_by_peft(base, tmp_path, init_lora_weights=how)
        expected = logits(loaded_by_peft(base, tmp_path))
    ours = copy.deepcopy(base)
    import_peft(ours, tmp_path)
    assert (expected - logits(base)).abs().max() > 1e-2
    close(logits(ours), expected, torch.float32)


def test_adalora_pruned_by_peft(tmp_path):
    base = base_of(llama)
    model = saved_by_peft(base, tmp_path, "adalora", TARGETS[llama])
    modules = model.base_model.model.named_modules()
    pruned = [(name, module) for name, module in modules if hasattr(module, "lora_E")][:-1]
    masks = [[True, False, True, False], [False] * 4, [True] * 4, [False, True, True, True]] * 2
    pattern = {}
    for (name, module), mask in zip(pruned, masks, strict=False):
        pattern[f"{name}.lora_E.default"] = mask
        module.lora_E["default"].data[~torch.tensor(mask)] = 0
    model.peft_config["default"].rank_pattern = pattern
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own of tensors without rows
        model.save_pretrained(tmp_path)
    assert len({t.shape for t in load_file(tmp_path / "adapter_model.safetensors").values()}) > 4
    expected = logits(loaded_by_peft(base, tmp_path))
    close(expected, logits(model))
    ours = copy.deepcopy(base)
    import_peft(ours, tmp_path)
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    close(logits(ours), expected)
    export_peft(ours, tmp_path / "b")
    close(logits(loaded_by_peft(base, tmp_path / "b")), expected)
    before, after = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "b"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    masks = config_of(tmp_path / "b")["rank_pattern"]
    assert masks == {k: v for k, v in config_of(tmp_path)["rank_pattern"].items() if not all(v)}


def test_adalora_of_several_ranks_and_scales_after_an_allocator(tmp_path):
    base = base_of(llama)
    ours = copy.deepcopy(base)
    tokengate.patch(
        ours, TARGETS[llama], "adalora", gate=False,
        rank={"*.q_proj": 6, "*": 4}, scale={"*.v_proj": 0.7, "*": 1.3}, target_rank=2,
    )  # fmt: skip
    optimizer = torch.optim.SGD(tokengate.param_groups(ours, lr=0.1), lr=0.1)
    tokengate.RankAllocator(ours, optimizer, total_steps=4, initial_warmup=0, final_warmup=1)
    away_from_initialisation(ours)
    for _ in range(4):
        optimizer.zero_grad()
        ours(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    export_peft(ours, tmp_path)
    kept = [sum(mask) for mask in config_of(tmp_path)["rank_pattern"].values()]
    assert sum(kept) == 2 * 6
    assert len(set(kept)) > 1
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    close(logits(loaded_by_peft(base, tmp_path)), logits(ours))


def test_an_untrained_adalora_keeps_its_rows(tmp_path):
    ours = tokengate.patch(base_of(llama), ["q_proj"], "adalora", rank=3)
    export_peft(ours, tmp_path)
    assert config_of(tmp_path)["rank_pattern"] is None
    shapes = {t.shape for t in load_file(tmp_path / "adapter_model.safetensors").values()}
    assert shapes == {(3, 32), (3, 1), (32, 3)}


class Ambiguous(nn.Module):
    """Each name is the end of others, with and without a dot before it, or a pattern for them."""

    NAMES = ("proj", "a.proj", "b.a.proj", "b.xproj", "layers.1.proj", "layers.11.proj", "aaproj")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            owner, _, attribute = name.rpartition(".")
            module = self
            for part in owner.split(".") if owner else ():
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.add_module(attribute, nn.Linear(6, 6))

    def forward(self, x):
        return torch.cat([self.get_submodule(name)(x) for name in self.NAMES], -1)


@settings(deadline=None, max_examples=many(25), suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(Ambiguous.NAMES),
        st.tuples(st.integers(1, 4), st.floats(0.1, 20)),
        min_size=1,
    ),
    st.sampled_from(METHODS),
)
def test_any_layers_of_ambiguous_names(tmp_path_factory, chosen, method):
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    base = Ambiguous().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    ours = copy.deepcopy(base)

    def options(name):
        rank, alpha = chosen[name]
        return {"rank": rank, ("scale" if method == "adalora" else "alpha"): alpha}

    for name in chosen:
        exactly = [lambda n, m, name=name: n == name][0]
        tokengate.patch(ours, exactly, method, **options(name))
    away_from_initialisation(ours)
    export_peft(ours, folder)
    theirs = loaded_by_peft(base, folder)
    assert (ours(x) - base(x)).abs().max() > 1e-4
    close(theirs(x), ours(x))
    again = copy.deepcopy(base)
    import_peft(again, folder)
    assert list(tokengate.layers(again)) == list(tokengate.layers(ours))
    close(again(x), ours(x))


def test_on_the_meta_device(tmp_path):
    base = base_of(bert, torch.float32)
    saved_by_peft(base, tmp_path, "dora", ["query"], modules_to_save=["classifier"])
    expected = logits(loaded_by_peft(base, tmp_path))
    with torch.device("meta"):
        ours = bert()
    import_peft(ours, tmp_path)
    export_peft(ours, tmp_path / "b")
    assert ours.bert.pooler.dense.weight.is_meta
    close(logits(loaded_by_peft(base, tmp_path / "b")), expected, torch.float32)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", METHODS)
def test_a_folded_adapter_is_exported_as_what_it_is(tmp_path, make, method):
    base = base_of(make)
    model = tokengate.patch(copy.deepcopy(base), list(TARGETS[make]), method=method, rank=4)
    away_from_initialisation(model, 0.2)
    layers = list(tokengate.layers(model).values())
    for layer in layers:
        layer.gate.tau.data.fill_(-1.0)
    layers[0].gate.tau.data.fill_(1e6)
    ids = torch.randint(3, 60, (2, 7))
    folding = tokengate.fold(model, [{"input_ids": ids}])
    assert len(folding.names("merged")) == len(layers) - 1
    assert len(folding.names("dropped")) == 1
    export_peft(model, tmp_path)
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    close(logits(loaded_by_peft(base, tmp_path)), logits(model))


@pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")
def test_an_imported_adapter_trains_gated(tmp_path):
    base = base_of(llama)
    saved_by_peft(base, tmp_path)
    ours = copy.deepcopy(base).train()
    import_peft(ours, tmp_path, tau=0.05)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    ours(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
    assert {name.rpartition(".")[2] for name in moved} == {"A", "B", "tau"}
