"""PEFT's adapters of experts' 3-D parameters, in and out."""

import copy
import json

import pytest
import torch

peft = pytest.importorskip("peft", "0.20")
pytest.importorskip("transformers", "5.20", reason="has the experts interface")

import test_mixtures as mixtures  # noqa: E402
from models import away_from_initialisation, one_sentence  # noqa: E402
from peft_adapters import QUIET, loaded_by_peft, randomised, refused, saved_by_peft  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import tokengate  # noqa: E402
from tokengate.integrations.hf_peft import export_peft, import_peft, read_saved  # noqa: E402

pytestmark = [
    *QUIET,
    # PEFT looks for them among modules alone, says so, and follows them.
    pytest.mark.filterwarnings(
        "ignore:.*_pattern keys did not match.*(experts|gate_up_proj):RuntimeWarning"
    ),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

# The last one's experts have inputs before outputs, and do not say so, as PEFT would ask them.
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"]
PATTERNS = {
    "rank_pattern": {"layers.0.+experts.gate_up_proj": 3, "q_proj": 2},
    "alpha_pattern": {r"layers\.1\..*experts.down_proj": 9},
}


def build(family):
    model, targets, implementations = mixtures.build(family)
    return model, targets, lambda m: mixtures.run(m, implementations[0]).detach()


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def same_files(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_beside_another_adapter(family, tmp_path):
    model, targets, run = build(family)
    theirs = saved_by_peft(
        model, tmp_path / "theirs", targets=["q_proj"], target_parameters=targets
    )
    wanted = run(theirs)
    model, _, run = build(family)
    tokengate.patch(model, targets=["k_proj"])
    base = run(model)
    import_peft(model, tmp_path / "theirs", name="theirs")
    close(run(model), base)
    with tokengate.use(model, "theirs"):
        close(run(model), wanted)
    assert (wanted - base).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, tmp_path):
    model, targets, run = build(family)
    plain, base = copy.deepcopy(model), run(model)
    options = {"target_parameters": targets, "use_rslora": family == "gpt_oss", **PATTERNS}
    wanted = run(saved_by_peft(model, tmp_path / "theirs", targets=["q_proj"], **options))
    assert (wanted - base).abs().max() > 1e-2
    assert import_peft(model, tmp_path / "theirs") == {}
    close(run(model), wanted)
    layers = tokengate.layers(model)
    assert len(layers) == 6
    down, up = (layers[n] for n in sorted(layers) if "layers.0" in n and "experts" in n)
    assert up.modification.A.shape[:2] == (down.num_experts, 3)
    assert up.gate.tau.shape == (up.num_experts,)
    assert down.modification.B.shape[2] == 4

    export_peft(model, tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    close(run(loaded_by_peft(plain, tmp_path / "ours")), wanted)

    tokengate.save(model, tmp_path / "saved")
    tokengate.load(plain, tmp_path / "saved")
    assert torch.equal(run(plain), run(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_is_as_they_would_write_it(family, tmp_path):
    """One of a module's parameters in one layer, both in the other, of other ranks; no modules."""
    model, (up, down), run = build(family)
    plain, base = copy.deepcopy(model), run(model)
    tokengate.patch(model, [down], rank=4, alpha=6, tau=0.0)
    tokengate.patch(model, [f"*.layers.1.*.{up}"], rank=3, alpha=7, gate=False)
    away_from_initialisation(model, 0.1)
    wanted = run(model)
    assert (wanted - base).abs().max() > 1e-2
    export_peft(model, tmp_path / "ours")
    theirs = loaded_by_peft(plain, tmp_path / "ours")
    close(run(theirs), wanted)
    theirs.save_pretrained(tmp_path / "theirs")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    again, _, _ = build(family)
    import_peft(again, tmp_path / "theirs", gate=False)
    close(run(again), wanted)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_of_some_experts_the_others_do_nothing_there(family, tmp_path):
    model, (up, down), run = build(family)
    plain, base = copy.deepcopy(model), run(model)
    some = [up.replace(".", f".{e}.") for e in (0, 2)]
    tokengate.patch(model, [*some, down], rank=3, gate=False)
    away_from_initialisation(model, 0.3)
    wanted = run(model)
    assert (wanted - base).abs().max() > 1e-2
    export_peft(model, tmp_path / "ours")
    close(run(loaded_by_peft(plain, tmp_path / "ours")), wanted)


def test_gates_that_may_close(tmp_path):
    model, targets, run = build("qwen3_moe")
    plain = copy.deepcopy(model)
    tokengate.patch(model, targets, rank=2, tau=0.0)
    away_from_initialisation(model, 0.1)
    wanted = run(model)
    with torch.no_grad():
        next(iter(tokengate.layers(model).values())).gate.tau[1] = 1e3  # of one expert
    assert (run(model) - wanted).abs().max() > 1e-4
    with one_sentence("tau above 0 in 1 of 4 layers", "ungated=True"):
        export_peft(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    export_peft(model, tmp_path / "ours", ungated=True)
    close(run(loaded_by_peft(plain, tmp_path / "ours")), wanted)


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        ([(mixtures.BOTH, {"method": "dora"})], ["experts in a 3-D parameter", "'dora'", "lora"]),
        ([(mixtures.BOTH, {"method": "adalora"})], ["experts in a 3-D parameter", "'adalora'"]),
        ([(["experts.gate_up_proj.up"], {})], ["a slice of a fused layer"]),
        ([(mixtures.BOTH, {}), (["q_proj"], {"method": "dora"})], ["one method"]),
        ([(mixtures.BOTH, {"dropout": 0.1})], ["dropout=0.1", "to 0"]),
    ],
)
def test_what_peft_has_not(patches, words, tmp_path):
    model, _, _ = build("qwen3_moe")
    for targets, options in patches:
        tokengate.patch(model, list(targets), gate=False, rank=2, **options)
    with one_sentence(*words):
        export_peft(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, ["target_parameters", "use_dora=True"]),
        ({"lora_dropout": 0.1}, ["target_parameters", "lora_dropout=0.1"]),
        ({"target_parameters": "down_proj"}, ["a list of names"]),
        ({"target_parameters": ["experts.down_proj"]}, ["base_layer", "is not in the model"]),
        ({"target_parameters": ["mlp.up"]}, ["base_layer", "['mlp.up']", "leave out"]),
        ({"r": 3}, ["of shape", "save the adapter again"]),
    ],
)
def test_configurations_that_fit_no_values(changes, words, tmp_path):
    model, targets, _ = build("qwen3_moe")
    saved_by_peft(model, tmp_path, targets=[], target_parameters=targets)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(model, tmp_path, *words)


def test_only_the_model_tells_them_apart(tmp_path):
    model, targets, _ = build("qwen3_moe")
    saved_by_peft(model, tmp_path, targets=[], target_parameters=targets)
    with one_sentence("target_parameters", "import_peft"):
        read_saved(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_biases_and_routers(tmp_path):
    """What is not matrices of experts is named, and skipped where that is asked for."""
    model, targets, _ = build("gpt_oss")
    names = [*targets, "experts.gate_up_proj_bias", "router.weight"]
    saved_by_peft(model, tmp_path, targets=[], target_parameters=names)
    refused(model, tmp_path, "mlp.router.weight", "a router's or a bias")
    skipped = import_peft(model, tmp_path, strict=False)
    own = "model.layers.0.mlp."
    assert sorted(n for n in skipped if n.startswith(own)) == [
        f"{own}experts.gate_up_proj_bias",
        f"{own}router.weight",
    ]
    saved = tensors_of(tmp_path)
    wrapper = f"base_model.{'model.' * 2}layers.0.mlp.experts"
    layers = tokengate.layers(model)
    for name, depth in (("down_proj", 0), ("gate_up_proj", 2)):
        A = saved[f"{wrapper}{'.base_layer' * depth}.lora_A.weight"]
        assert torch.equal(layers[f"{own}experts.{name}"].modification.A.flatten(0, 1), A)


def test_names_that_were_of_experts_layers(tmp_path):
    """PEFT takes them for the experts' parameters, and of those that are still layers, too."""
    model, _, run = build("deepseek_v3")
    plain = copy.deepcopy(model)
    names = ["gate_proj", "up_proj", "down_proj", "o_proj"]
    wanted = run(saved_by_peft(model, tmp_path / "theirs", targets=names))
    import_peft(model, tmp_path / "theirs")
    close(run(model), wanted)
    layers = tokengate.layers(model)
    own = "model.layers.1.mlp.experts"
    assert layers[f"{own}.gate_up_proj"].modification.rank == 8  # of both
    assert "model.layers.0.mlp.down_proj" not in layers
    export_peft(model, tmp_path / "ours")
    close(run(loaded_by_peft(plain, tmp_path / "ours")), wanted)

    saved_by_peft(plain, tmp_path / "routers", targets="all-linear")
    refused(plain, tmp_path / "routers", "model.layers.1.mlp.gate.weight", "all-linear")

    tokengate.unpatch(model)
    tokengate.patch(model, ["shared_experts.down_proj"], gate=False)
    with one_sentence("shared_experts.down_proj", "DeepseekV3ForCausalLM", "leave the layer out"):
        export_peft(model, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_folded(tmp_path):
    model, targets, run = build("qwen3_moe")
    plain = copy.deepcopy(model)
    tokengate.patch(model, targets, rank=2, gate=False)
    away_from_initialisation(model, 0.1)
    wanted = run(model)
    assert tokengate.fold(model, [{"input_ids": torch.arange(64)[None]}])
    assert not tokengate.layers(model)
    export_peft(model, tmp_path)
    close(run(loaded_by_peft(plain, tmp_path)), wanted)


def test_other_models(tmp_path):
    model, targets, _ = build("qwen3_moe")
    saved_by_peft(model, tmp_path / "all", targets=[], target_parameters=targets)
    fewer = copy.deepcopy(model)
    del fewer.model.layers[1]
    refused(fewer, tmp_path / "all", "layers.1.mlp.experts", "is not in the model")
    skipped = import_peft(fewer, tmp_path / "all", strict=False)
    assert len(skipped) == len(tokengate.layers(fewer)) == 2

    saved_by_peft(fewer_experts(), tmp_path / "few", targets=[], target_parameters=targets)
    refused(model, tmp_path / "few", "shape [2, 4, 32]", "[4, 4, 32]", "gate_up_proj")

    partly = [f"model.layers.0.mlp.{name}" for name in targets]
    saved_by_peft(model, tmp_path / "partly", targets=[], target_parameters=partly)
    path = tmp_path / "partly" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": targets}))
    refused(model, tmp_path / "partly", "model.layers.1.mlp.experts", "has no values for it")


def fewer_experts():
    model, _, _ = build("qwen3_moe")
    for layer in model.model.layers:
        for name, parameter in layer.mlp.experts.named_parameters():
            setattr(layer.mlp.experts, name, torch.nn.Parameter(parameter[:2]))
    return model


class Experts(torch.nn.Module):
    """Of a layout that nobody knows but whoever wrote it."""

    def __init__(self):
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.randn(3, 6, 8))  # (experts, inputs, outputs)

    def forward(self, x):  # (3, N, 6)
        return torch.bmm(x, self.w1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("says", [False, True])
def test_axes_of_ones_own(says, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"moe": Experts()})
    if says:
        model["moe"].is_transposed = True
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["moe.w1"])
    theirs = randomised(peft.get_peft_model(copy.deepcopy(model), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    refused(model, tmp_path / "theirs", "moe.w1", "experts=")
    refused(model, tmp_path / "theirs", "experts= names 'w2'", experts={"w2": "eio"})
    x = torch.randn(3, 5, 6)
    base = model["moe"](x)
    import_peft(model, tmp_path / "theirs", experts={"moe.w1": "eio"})
    found, wanted = model["moe"](x), theirs.base_model.model["moe"](x)
    assert (found - base).abs().max() > 0.1
    close(found, wanted)
    export_peft(model, tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
