"""LLaVA-1.5-7B with the settings of the paper's Table 7, on the meta device."""

import importlib
import sys

import pytest
import torch
from places import RECIPES

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("sklearn", reason="the examples extra is not installed")

NAMES = ("recipe", "recipe_results", "visual_data", "visual_instruction")

# By hand. Inputs and outputs of Vicuna-7B's layers: hidden 4096, MLP 11008, as many keys as heads.
SHAPES = {
    "q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096),
    "gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096),
}  # fmt: skip
# Inputs and outputs of a block: 4 (4096 + 4096) + 3 (4096 + 11008) = 78,080; outputs alone:
# 5 x 4096 + 2 x 11008 = 42,496; 32 blocks.
LORA = 128 * 78_080 * 32
DORA = LORA + 42_496 * 32  # and a magnitude for each output
ADALORA = 256 * 78_080 * 32 + 256 * 7 * 32  # and a singular value for each rank
# Vicuna: 4 x 4096^2 + 3 x 4096 x 11008 in a block and its two norms, one norm at the end, and both
# embeddings of 32064 words.
VICUNA = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * 32064 * 4096
# CLIP ViT-L/14: attention 4 (1024^2 + 1024), MLP 2 x 1024 x 4096 + 4096 + 1024, two norms of 2 x
# 1024 in each of 24 blocks; 14 x 14 patches of three colours, 24^2 + 1 places, a class and two
# norms.
CLIP = 24 * (4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024)
CLIP += 1024 * 3 * 14**2 + (24**2 + 1) * 1024 + 1024 + 4 * 1024
PROJECTOR = 1024 * 4096 + 4096 + 4096**2 + 4096


@pytest.fixture
def visual(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("visual_instruction")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def runs(visual, monkeypatch):
    """The recipe's runs by method, as its defaults have them."""
    monkeypatch.setattr(visual.recipe, "main", lambda runs, perform: found.extend(runs))
    found = []
    line = "--data d --gate on --method lora dora adalora"
    monkeypatch.setattr(sys, "argv", ["visual_instruction.py", *line.split()])
    visual.main()
    return {run.method: run for run in found}


def build(visual):
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(visual.LLAVA_1_5_7B)


def test_the_model_is_llava_1_5_7b(visual):
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in build(visual).model.named_children()
    }
    head = 32064 * 4096
    assert counts == {
        "vision_tower": CLIP, "multi_modal_projector": PROJECTOR, "language_model": VICUNA - head,
    }  # fmt: skip
    assert CLIP + PROJECTOR + VICUNA == 7_063_427_072


@pytest.mark.parametrize(
    ("method", "wanted"), [("lora", LORA), ("dora", DORA), ("adalora", ADALORA)]
)
def test_what_is_trained_by_hand(visual, runs, method, wanted):
    model = build(visual)
    with torch.device("meta"):
        visual.recipe.patch(model, visual.targets(model, ["language"]), runs[method])
    layers = tokengate.layers(model)
    assert sorted(layers) == sorted(
        f"model.language_model.layers.{i}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}"
        for i in range(32)
        for name in SHAPES
    )
    assert len(layers) == 224
    for name, layer in layers.items():
        found = (layer.modification.in_features, layer.modification.out_features)
        assert found == SHAPES[name.rpartition(".")[2]]
        assert layer.gate.penalty == {"lora": 2e-6, "dora": 1e-6, "adalora": 5e-7}[method]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == wanted + 224  # a tau each


def test_the_vision_tower_without_its_last_layer_and_the_projector(visual):
    model = build(visual)
    vision = visual.targets(model, ["vision"])
    # vision_feature_layer=-2: what the 24th layer does is not seen. Q, K, V, O, Up, Down.
    assert len(vision) == 23 * 6
    assert {name.split("layers.")[1].split(".")[0] for name in vision} == {*map(str, range(23))}
    projector = visual.targets(model, ["projector"])
    assert [name.rpartition(".")[2] for name in projector] == ["linear_1", "linear_2"]
    every = visual.targets(model, ["language", "projector", "vision"])
    assert len(every) == len(set(every)) == 224 + 2 + 23 * 6
    assert {*vision, *projector} < {*every}


def test_the_plan_is_printed_with_its_memory(visual, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visual_instruction.py", "--plan", "--gate", "on"])
    visual.main()
    text = capsys.readouterr().out
    assert "lora-on-0\n" in text
    assert "224 layers would be patched" in text
    assert f"{LORA + 224:,} of {7_063_427_072 + LORA + 224:,} parameters trained" in text
    # Two bytes of each frozen parameter, four of each trained one, of its gradient and of each of
    # Adam's two states.
    memory = {
        "frozen parameters": 2 * 7_063_427_072,
        "gradients": 4 * (LORA + 224),
        "Adam's states": 8 * (LORA + 224),
        "together, without activations": 2 * 7_063_427_072 + 16 * (LORA + 224),
    }
    shown = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in text.splitlines()}
    for name, size in memory.items():
        assert shown[name] == f"{size / 2**30:.1f} GiB"
