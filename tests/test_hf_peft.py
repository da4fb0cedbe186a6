"""Adapters of Hugging Face PEFT, in both directions: equal outputs, or one sentence."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Net, away_from_initialisation, snapshot
from safetensors.torch import load_file
from test_saving import edit, rewrite
from torch import nn

import tokengate
from tokengate import Slices, TokenGateError
from tokengate.integrations.hf_peft import export_peft, import_peft

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
peft = pytest.importorskip("peft", reason="the test extra is not installed")

# transformers renamed what PEFT still asks for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # PEFT says so of every rank_pattern of AdaLoRA, its own included, and follows it.
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match.*lora_E:RuntimeWarning"),
]

METHODS = ["lora", "dora", "adalora"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64, initializer_range=0.1, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.1, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


TARGETS = {
    llama: ["q_proj", "v_proj", "down_proj"],
    bert: ["query", "attention.output.dense"],
    gpt2: ["c_attn", "mlp.c_proj"],
}
MODELS = list(TARGETS)
IDS = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(4))


def base_of(make, dtype=torch.float64):
    torch.manual_seed(7)
    model = make().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they are 0 in a new model
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def randomised(model, parts=("lora_", "modules_to_save")):
    """PEFT's parameters away from their initial values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ranknum" in name or not any(part in name for part in parts):
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            around = parameter if "magnitude" in name else torch.zeros_like(parameter)
            parameter.copy_(around + 0.3 * noise)
    return model


def peft_config(method, targets, **options):
    if method == "adalora":
        options = {"init_r": 4, "target_r": 2, "total_step": 10, **options}
        kind = peft.AdaLoraConfig
    else:
        options = {"r": 4, "use_dora": method == "dora", **options}
        kind = peft.LoraConfig
    return kind(**{"lora_alpha": 6, "target_modules": targets, **options})


def saved_by_peft(base, folder, method="lora", targets=("q_proj", "v_proj"), **options):
    if isinstance(base, transformers.GPT2LMHeadModel):
        options["fan_in_fan_out"] = True
    targets = targets if isinstance(targets, str) else list(targets)
    config = peft_config(method, targets, **options)
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    randomised(model).eval()
    model.save_pretrained(folder)
    return model


def loaded_by_peft(base, folder):
    model = copy.deepcopy(base)
    return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


def close(a, b, dtype=torch.float64):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


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


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_initialisations_that_change_the_base(tmp_path, how):
    base = base_of(llama, torch.float32)
    saved_by_peft(base, tmp_path, init_lora_weights=how)
    weight = loaded_by_peft(base, tmp_path).base_model.model.model.layers[0].self_attn.q_proj
    # PEFT takes the same out of the base again, so that it is another than ours.
    assert not torch.equal(weight.base_layer.weight, base.model.layers[0].self_attn.q_proj.weight)
    refused(copy.deepcopy(base), tmp_path, f"init_lora_weights='{how}'", "base's own weights")


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


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
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


def test_a_gated_adapter_is_exported_only_when_asked(tmp_path):
    base = base_of(llama)
    ours = tokengate.patch(copy.deepcopy(base), ["q_proj"], rank=2)
    away_from_initialisation(ours)
    tokengate.layers(ours)["model.layers.1.self_attn.q_proj"].gate.tau.data.fill_(5.0)
    text = not_exported(ours, tmp_path / "a", "tau above 0 in 1 of 2 layers", "tau=5", "layers.1")
    assert "ungated=True" in text
    export_peft(ours, tmp_path / "a", ungated=True)
    theirs = logits(loaded_by_peft(base, tmp_path / "a"))
    assert (theirs - logits(ours)).abs().max() > 1e-2
    for layer in tokengate.layers(ours).values():
        layer.gate.tau.data.zero_()
    close(theirs, logits(ours))


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


def not_exported(model, folder, *words, **options):
    before = set(folder.iterdir()) if folder.exists() else None
    with pytest.raises(TokenGateError) as error:
        export_peft(model, folder, **options)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert word in text, text
    assert (set(folder.iterdir()) if folder.exists() else None) == before
    return text


def test_what_peft_has_no_equal_for_is_not_exported(tmp_path):
    folder = tmp_path / "a"
    patch = tokengate.patch
    not_exported(Net(), folder, "without a patched layer")
    not_exported(patch(Net(), ["fc1"], "adapter"), folder, "'adapter'", "no equal", "fc1")
    slices = {"fc1": Slices(a=8, b=8)}
    sliced = patch(Net(), ["fc1.a"], slices=slices)
    not_exported(sliced, folder, "a slice of a fused layer", "'blocks.0.fc1.a'")
    not_exported(patch(nn.Linear(4, 4), lambda n, m: True), folder, "the whole model")

    class Own(tokengate.LoRA):
        pass

    not_exported(patch(Net(), ["fc1"], Own), folder, "'Own'")
    mixed = patch(patch(Net(), ["fc1"], "lora"), ["q_proj"], "dora")
    not_exported(mixed, folder, "'dora'", "'lora'", "one method")
    dropouts = patch(Net(), ["fc1"], dropout={"blocks.0.*": 0.1, "*": 0.2})
    not_exported(dropouts, folder, "dropout=0.1", "0.2")
    with torch.device("meta"):
        meta = patch(Net(), ["fc1"])
    not_exported(meta, folder, "export_peft found no values", "meta device")
    model = patch(Net(), ["fc1"])
    not_exported(model, folder, "task_type='chat'", "SEQ_CLS", task_type="chat")
    not_exported(model, folder, "ungated=3", ungated=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenGateError, match="is a file"):
        export_peft(model, tmp_path / "file")
    tokengate.save(model, tmp_path / "own")
    not_exported(model, tmp_path / "own", "holds an adapter that is not PEFT's")
    export_peft(model, folder)
    export_peft(model, folder)  # PEFT's own is replaced


def test_heads_that_are_no_whole_modules_are_not_exported(tmp_path):
    folder = tmp_path / "a"
    patch = tokengate.patch
    model = patch(Net(), ["fc1"], train=["head.bias"])
    not_exported(model, folder, "'head.bias'", "'weight' is not trained")
    direct = Net()
    direct.scale = nn.Parameter(torch.ones(3))
    not_exported(patch(direct, ["fc1"], train=["scale"]), folder, "'scale'", "the model itself")
    tied = base_of(gpt2)
    not_exported(patch(tied, ["c_attn"], train=["wte"]), folder, "tied")
    named = Net()
    named.lora_head = nn.Linear(3, 3)
    not_exported(patch(named, ["fc1"], train=["lora_head"]), folder, "'lora_' in its name")
    # PEFT matches modules to save by the end of their names.
    twins = Net()
    twins.other_head = nn.Linear(3, 3)
    not_exported(patch(twins, ["fc1"], train=["head"]), folder, "'other_head'", "too with")
    inside = Net()
    inside.part = nn.Module()
    inside.part.head = nn.Linear(8, 8)
    inside.part.head.fc1 = nn.Linear(8, 8)
    text = not_exported(patch(inside, ["fc1"], train=["head.weight", "head.bias"]), folder)
    assert "'fc1.weight' is not trained" in text
    inside = Net()
    inside.head = nn.Sequential(nn.Linear(8, 3))
    model = patch(inside, ["fc1"], train=["head"])
    export_peft(model, folder)
    assert config_of(folder)["modules_to_save"] == ["head.0"]
    bert_model = patch(base_of(bert), ["query"])
    not_exported(bert_model, tmp_path / "b", "'classifier'", "task_type", task_type="SEQ_CLS")


def test_a_layer_that_peft_takes_for_a_part_of_a_head_is_not_exported(tmp_path):
    model = Net()
    model.out = nn.Module()
    model.out.head = nn.Module()
    model.out.head.fc = nn.Linear(3, 3)
    tokengate.patch(model, ["out.head.fc"], train=["head.weight", "head.bias"])
    not_exported(model, tmp_path / "a", "'out.head'", "modules_to_save=['head']")
    # A dot in the head's name matches any character, too.
    model = Net()
    model.head = nn.Sequential(nn.Linear(8, 3))
    model.head_0 = nn.Sequential(nn.Linear(3, 3))
    tokengate.patch(model, ["head_0.0"], train=["head"])
    not_exported(model, tmp_path / "a", "the layer 'head_0.0'", "modules_to_save=['head.0']")


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Module(), nn.Module()
        self.a.q = self.b.q = nn.Linear(4, 4)
        self.a.v = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.a.q(x), self.b.q(x), self.a.v(x)], -1)


def test_a_layer_in_two_places_is_neither_exported_nor_imported(tmp_path):
    x = torch.randn(3, 4)
    theirs = saved_by_peft(Twice(), tmp_path, targets=["q", "v"])
    apart = (theirs(x) - theirs.base_model.model.b.q(x).repeat(1, 3)).abs().amax(0)
    assert apart[:4].min() > 0  # adapted
    assert apart[4:8].max() == 0  # and not adapted
    refused(Twice(), tmp_path, "'a.q' is held by several modules")
    model = Twice()
    assert list(import_peft(model, tmp_path, strict=False)) == ["a.q"]
    assert list(tokengate.layers(model)) == ["a.v"]
    not_exported(tokengate.patch(Twice(), ["q"]), tmp_path / "b", "'a.q'", "several modules")
    export_peft(tokengate.patch(Twice(), ["v"]), tmp_path / "b")


def test_pruned_rows_in_a_layer_called_default_are_not_exported(tmp_path):
    model = nn.Module()
    model.default = nn.Linear(4, 4)
    tokengate.patch(model, ["default"], "adalora", rank=2)
    away_from_initialisation(model)
    export_peft(model, tmp_path / "a")
    model.default.modification.E.data[0] = 0
    not_exported(model, tmp_path / "b", "'default.lora_E'", "pruned")


def refused(model, folder, *words, **options):
    """The one sentence that import_peft answers, having touched nothing."""
    before = snapshot(model)
    with pytest.raises(TokenGateError) as error:
        import_peft(model, folder, **options)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert word in text, text
    assert snapshot(model) == before
    return text


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("lora", {"peft_type": "VERA"}, ["peft_type='VERA'"]),
        ("lora", {"use_frobnication": 2}, ["use_frobnication=2", "not known"]),
        ("lora", {"use_frobnication": False}, ["use_frobnication=False"]),
        ("lora", {"bias": "all"}, ["bias='all'", "no equal"]),
        ("lora", {"lora_bias": True}, ["lora_bias=True"]),
        ("lora", {"use_qalora": True}, ["use_qalora"]),
        ("lora", {"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ("lora", {"target_parameters": ["experts.w"]}, ["target_parameters"]),
        ("lora", {"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ("lora", {"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ("lora", {"use_bdlora": {"nblocks": 2}}, ["use_bdlora"]),
        ("lora", {"ensure_weight_tying": True}, ["ensure_weight_tying"]),
        ("lora", {"megatron_config": {"a": 1}}, ["megatron_config"]),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, ["'pissa_niter_4'"]),
        ("lora", {"init_lora_weights": "corda"}, ["'corda'", "base"]),
        ("lora", {"init_lora_weights": "loftq"}, ["'loftq'", "base"]),
        ("lora", {"init_lora_weights": "lora_ga"}, ["'lora_ga'", "base"]),
        ("lora", {"init_lora_weights": ["gaussian"]}, ["['gaussian']"]),
        ("lora", {"r": 5}, ["q_proj.lora_A.weight'", "[4, 32]", "[5, 32]"]),
        ("lora", {"r": "4"}, ["rank of", "'4'"]),
        ("lora", {"rank_pattern": {"q_proj": 2}}, ["q_proj.lora_A.weight'", "[2, 32]"]),
        ("lora", {"rank_pattern": ["q_proj"]}, ["rank_pattern=['q_proj']"]),
        ("lora", {"rank_pattern": {"q_proj(": 2}}, ["no regular expression"]),
        ("lora", {"lora_alpha": 0}, ["alpha of", "above 0"]),
        ("lora", {"lora_alpha": "6"}, ["alpha of", "'6'"]),
        ("lora", {"alpha_pattern": {"q_proj": None}}, ["alpha of", "None"]),
        ("lora", {"lora_dropout": 1.5}, ["lora_dropout=1.5"]),
        ("lora", {"use_dora": 1}, ["use_dora=1"]),
        ("lora", {"use_dora": True}, ["lacks", "lora_magnitude_vector", "[4, 32]"]),
        ("dora", {"use_dora": False}, ["lora_magnitude_vector", "[32]", "LORA"]),
        ("lora", {"target_modules": None}, ["no target_modules"]),
        ("lora", {"target_modules": {"a": 1}}, ["target_modules={'a': 1}"]),
        ("lora", {"target_modules": ["v_proj"]}, ["q_proj", "leave out", "drop"]),
        ("lora", {"target_modules": ["q_proj", "v_proj", "o_proj"]}, ["o_proj", "no values"]),
        ("lora", {"exclude_modules": ["q_proj"]}, ["q_proj", "leave out"]),
        ("lora", {"modules_to_save": ["lm_head"]}, ["lm_head.weight", "no values"]),
        ("adalora", {"init_r": 3}, ["q_proj.lora_B'", "[32, 4]", "[32, 3]"]),
        ("adalora", {"rank_pattern": {"x.lora_E": [True] * 4}}, ["x.lora_E", "no layer"]),
        ("adalora", {"peft_type": "LORA"}, ["q_proj.lora_A'", "[4, 32]"]),
        ("lora", {"peft_type": "ADALORA"}, ["q_proj.lora_A.weight'", "[4, 32]"]),
    ],
    ids=str,
)
def test_a_configuration_without_an_equal_is_refused(tmp_path, method, changes, words):
    base = base_of(llama)
    saved_by_peft(base, tmp_path, method)
    import_peft(copy.deepcopy(base), tmp_path)
    edit(tmp_path, **changes)
    refused(base, tmp_path, *words)


@pytest.mark.parametrize("mask", [[True] * 3, [1, 1, 1, 1], True])
def test_a_mask_that_is_none_is_refused(tmp_path, mask):
    base = base_of(llama)
    saved_by_peft(base, tmp_path, "adalora")
    name = "model.layers.0.self_attn.q_proj.lora_E"
    edit(tmp_path, rank_pattern={name: [True] * 4})
    import_peft(copy.deepcopy(base), tmp_path)
    edit(tmp_path, rank_pattern={name: mask})
    refused(base, tmp_path, name, "init_r=4")


PLACE = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{PLACE}lora_A.weight"), ["lacks", f"{PLACE}lora_A.weight", "[32, 4]"]),
        (lambda t: t.pop(f"{PLACE}lora_B.weight"), ["lacks", f"{PLACE}lora_B.weight", "[4, 32]"]),
        (
            lambda t: t.update({f"{PLACE}lora_B.weight": torch.ones(32, 5)}),
            [f"{PLACE}lora_B.weight", "[32, 5]", "[32, 4]"],
        ),
        (
            lambda t: t.update({f"{PLACE}lora_A.weight": torch.ones(4, 33)}),
            ["layers.0.self_attn.q_proj", "(33, 32)", "(32, 32)"],
        ),
        (
            lambda t: t.update({f"{PLACE}lora_A.weight": torch.tensor(1.0)}),
            [f"{PLACE}lora_A.weight", "[]"],
        ),
        (lambda t: t[f"{PLACE}lora_A.weight"].fill_(float("nan")), ["lora_A.weight", "not finite"]),
        (
            lambda t: t.update({f"{PLACE}lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}),
            [f"{PLACE}lora_A.weight", "I32"],
        ),
        (lambda t: t.update({f"{PLACE}lora_B.bias": torch.ones(32)}), ["lora_B.bias", "[32]"]),
        (lambda t: t.update({f"{PLACE}weight": torch.ones(32, 32)}), ["q_proj.weight", "[32, 32]"]),
        (lambda t: t.update({"q_proj.lora_A.weight": torch.ones(4, 32)}), ["'q_proj.lora_A"]),
        (
            lambda t: t.update({f"{PLACE[:17]}model.embed_tokens.lora_embedding_A": torch.ones(4)}),
            ["lora_embedding_A", "[4]"],
        ),
        (dict.clear, ["no adapted layer"]),
    ],
)
def test_other_tensors_are_refused(tmp_path, change, words):
    base = base_of(llama)
    saved_by_peft(base, tmp_path)
    import_peft(copy.deepcopy(base), tmp_path)
    rewrite(tmp_path, change)
    refused(base, tmp_path, *words)


def test_embeddings_and_missing_layers_are_refused_or_skipped(tmp_path):
    base = base_of(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT saves the embedding itself, too
        saved_by_peft(base, tmp_path / "a", targets=["embed_tokens", "q_proj"])
    refused(copy.deepcopy(base), tmp_path / "a", "embed_tokens")
    saved_by_peft(base, tmp_path / "b")
    smaller = base_of(llama)
    del smaller.model.layers[1]
    text = refused(smaller, tmp_path / "b", "model.layers.1.self_attn.q_proj", "not in the model")
    assert "strict=False" in text
    skipped = import_peft(smaller, tmp_path / "b", strict=False)
    assert sorted(skipped) == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]
    assert len(tokengate.layers(smaller)) == 2
    edit(tmp_path / "b", target_modules=["q_proj", "v_proj", "o_proj"])
    skipped = import_peft(copy.deepcopy(base), tmp_path / "b", strict=False)
    assert sorted(skipped) == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]


def test_heads_that_do_not_fit_are_refused(tmp_path):
    base = base_of(bert)
    saved_by_peft(base, tmp_path, targets=["query"], task_type="SEQ_CLS")
    assert config_of(tmp_path)["modules_to_save"] == ["classifier", "score"]
    import_peft(copy.deepcopy(base), tmp_path)
    other = base_of(bert)
    other.classifier = nn.Linear(32, 5).double()
    refused(other, tmp_path, "classifier.", "[3", "[5")
    skipped = import_peft(other, tmp_path, strict=False)
    assert sorted(skipped) == ["classifier.bias", "classifier.weight"]
    rewrite(tmp_path, lambda t: t.pop("base_model.model.classifier.bias"))
    refused(copy.deepcopy(base), tmp_path, "classifier.bias", "no values")
    edit(tmp_path, modules_to_save=None)
    refused(copy.deepcopy(base), tmp_path, "classifier.weight", "[3, 32]", "modules_to_save")


def test_a_target_that_is_saved_whole_is_a_head(tmp_path):
    base = Net()
    saved_by_peft(base, tmp_path, targets=["fc1", "head"], modules_to_save=["head"])
    import_peft(base, tmp_path)
    assert list(tokengate.layers(base)) == ["blocks.0.fc1", "blocks.1.fc1"]
    assert base.head.weight.requires_grad


def test_tied_heads_and_buffers_are_refused(tmp_path):
    base = base_of(gpt2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own of tied weights
        saved_by_peft(base, tmp_path / "a", targets=["c_attn"], modules_to_save=["lm_head"])
    refused(base, tmp_path / "a", "lm_head.weight", "tied")
    plain = Net()
    plain.norm = nn.BatchNorm1d(3)
    saved_by_peft(plain, tmp_path / "b", targets=["fc1"], modules_to_save=["blocks.0.norm"])
    import_peft(copy.deepcopy(plain), tmp_path / "b")
    plain.blocks[0].norm = nn.BatchNorm1d(8)
    saved_by_peft(plain, tmp_path / "b", targets=["fc1"], modules_to_save=["blocks.0.norm"])
    refused(plain, tmp_path / "b", "blocks.0.norm.", "is a buffer")


def test_folders_that_are_none_of_pefts_are_refused(tmp_path):
    base = base_of(llama)
    refused(base, tmp_path / "nowhere", "does not exist")
    saved_by_peft(base, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    refused(base, tmp_path, "adapter_model.bin", "pickle", "safetensors")
    (tmp_path / "adapter_model.bin").unlink()
    refused(base, tmp_path, "adapter_model.safetensors", "does not exist")
    weights.write_bytes(b"no tensors")
    refused(base, tmp_path, "no safetensors file")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(base, tmp_path, "JSON")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(base, tmp_path, "no peft_type")
    patched = tokengate.patch(base_of(llama), ["q_proj"])
    tokengate.save(patched, tmp_path / "own")
    refused(base, tmp_path / "own", "tokengate.load reads")
    saved_by_peft(base, tmp_path / "b")
    refused(patched, tmp_path / "b", "patched already")
    refused(base, tmp_path / "b", "tau='0'", tau="0")
    refused(base, tmp_path / "b", "penalty=-1", penalty=-1)
    refused(base, tmp_path / "b", "gate=1", gate=1)
    saved_by_peft(base_of(llama, torch.float64), tmp_path / "c")
    refused(base_of(llama, torch.float32), tmp_path / "c", "float64", "float32", "cannot hold")
    with pytest.raises(TokenGateError, match="import_peft was given a int"):
        import_peft(3, tmp_path / "b")


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
