"""LLaVA and Qwen-VL: vision tower, projector, language model; images and text apart."""

import re

import pytest
import reference
import torch
from models import away_from_initialisation, one_sentence, snapshot
from torch import nn

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from tokengate.integrations.llava import llava_targets, record_modalities, restrict_to  # noqa: E402

IMAGE, VIDEO = 63, 62
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def llava(layers=2, vision=transformers.CLIPVisionConfig, **options):
    config = transformers.LlavaConfig(
        vision_config=vision(**VISION, num_hidden_layers=layers),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
        **options,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def qwen(version):
    """Qwen2-VL, 2.5 or 3, of which only the vision configs differ."""
    module = {"2": "Qwen2VL", "2.5": "Qwen2_5_VL", "3": "Qwen3VL"}[version]
    vision = {"depth": 2, "num_heads": 4, "patch_size": 2, "hidden_size": 32}
    vision |= {
        "2": {"embed_dim": 32},
        "2.5": {
            "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1],
            "window_size": 8,
        },
        "3": {
            "out_hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    }[version]  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = TEXT | {"rope_parameters": rope, "head_dim": 8}
    config = getattr(transformers, f"{module}Config")(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=61, vision_end_token_id=60,
    )  # fmt: skip
    return getattr(transformers, f"{module}ForConditionalGeneration")(config).eval()


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, num_hidden_layers=2),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
    )
    return transformers.LlavaNextForConditionalGeneration(config).eval()


# Image positions and text of each sample: two images, one, and none.
IMAGES, WORDS = (2, 1, 0), (5, 3, 4)


def random(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_of(each, side="right", images=IMAGES, words=WORDS, token=IMAGE):
    """Ids and mask of samples with `each` positions for every image, padded at one side."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for image_count, length in zip(images, words, strict=True):
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        for i in range(image_count):  # apart from each other
            ids[1 + i * (each + 1) : 1 + i * (each + 1)] = [token] * each
        samples.append(ids)
    width = max(map(len, samples))
    ids, mask = torch.zeros(len(samples), width).long(), torch.zeros(len(samples), width).long()
    for row, sample in enumerate(samples):
        where = slice(0, len(sample)) if side == "right" else slice(width - len(sample), width)
        ids[row, where], mask[row, where] = torch.tensor(sample), 1
    return {"input_ids": ids, "attention_mask": mask}


def llava_batch(side="right", **options):
    return text_of(4, side, **options) | {"pixel_values": random(3, 3, 16, 16)}


def qwen_batch(side="right"):
    """Two images and a video, each of sixteen patches that are merged into four positions."""
    given = text_of(4, side)
    ids = given["input_ids"]
    second = ids[1] == IMAGE
    ids[1, second] = VIDEO
    grid = torch.tensor([[1, 4, 4]])
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return given | {
        "pixel_values": random(32, 24),
        "image_grid_thw": grid.expand(2, 3),
        "pixel_values_videos": random(16, 24, seed=3),
        "video_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


def llava_next_batch(side="right"):
    # The whole image and one tile, of four positions each, and a new line for each of two rows.
    given = text_of(10, side)
    sizes = torch.tensor([[16, 16]] * 3)
    return given | {"pixel_values": random(3, 2, 3, 16, 16), "image_sizes": sizes}


FAMILIES = {
    "llava": (llava, llava_batch),
    "llava_next": (llava_next, llava_next_batch),
    "qwen2_vl": (lambda: qwen("2"), qwen_batch),
    "qwen2_5_vl": (lambda: qwen("2.5"), qwen_batch),
    "qwen3_vl": (lambda: qwen("3"), qwen_batch),
}
# What is asked for and the layers that it means, of two: q, k and v are one layer in Qwen-VL.
ASKED = {
    "llava": {
        "vision": (["q_proj", "v_proj"], 2),
        "projector": (["linear_1", "linear_2"], 2),
        "language": (["q_proj", "v_proj"], 4),
    },
    "qwen": {
        "vision": (["attn.qkv"], 2),
        "projector": (["all-linear"], 2),
        "language": (["q_proj", "v_proj"], 4),
    },
}
PREFIXES = {
    "llava": {
        "vision": "model.vision_tower.",
        "projector": "model.multi_modal_projector.",
        "language": "model.language_model.",
    },
    "qwen": {
        "vision": "model.visual.blocks.",
        "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "language": "model.language_model.",
    },
}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("parts", [("vision",), ("projector",), ("language",), ("all",)])
def test_one_part_or_all(family, parts):
    build, inputs = FAMILIES[family]
    model, given = build(), inputs()
    kind = family.partition("_")[0].rstrip("2345")
    parts = list(ASKED[kind]) if parts == ("all",) else list(parts)
    base = model(**given).logits
    before = snapshot(model)  # not earlier: the first forward leaves hooks and attributes behind
    names = []
    for part in parts:
        targets, count = ASKED[kind][part]
        found = llava_targets(model, part, targets)
        assert len(found) == count + 2 * (part == "projector" and family == "qwen3_vl")
        assert all(name.startswith(PREFIXES[kind][part]) for name in found)
        names += found
    tokengate.patch(model, names, tau=0.05)
    assert set(tokengate.layers(model)) == set(names)
    assert torch.equal(model(**given).logits, base)
    tokengate.verify(model, **given)
    away_from_initialisation(model, 0.5)
    assert not torch.allclose(model(**given).logits, base, atol=1e-3)
    tokengate.unpatch(model)
    assert torch.equal(model(**given).logits, base)
    assert snapshot(model) == before


@pytest.mark.parametrize("version", ["2", "2.5", "3"])
@pytest.mark.parametrize("targets", [["qkv.q", "attn.qkv.v"], ["*.qkv.[qv]"], "*.qkv.q"])
def test_slices_of_fused_layers(version, targets):
    """The same as `patch` finds, in one part."""
    model = qwen(version)
    found = llava_targets(model, "vision", targets)
    assert found[0] == "model.visual.blocks.0.attn.qkv.q"
    assert len(found) == 2 * (2 if isinstance(targets, list) else 1)
    tokengate.patch(model, targets)
    assert list(tokengate.layers(model)) == found
    # Patched, they are found as they were.
    assert llava_targets(model, "vision", targets) == found
    tokengate.unpatch(model)
    # A whole that is matched is not its slices; nor is a single word one of them.
    assert llava_targets(model, "vision", "*attn*") == [
        f"model.visual.blocks.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "proj")
    ]
    assert not any("qkv." in name for name in llava_targets(model, "vision", "all-linear"))
    with pytest.raises(tokengate.TokenGateError, match="target 'q' matches no linear layer"):
        llava_targets(model, "vision", "q")


def paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config=VISION
        | {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "vision_use_head": True},
        text_config=TEXT | {"model_type": "gemma", "head_dim": 8},
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


def internvl():
    vision = {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=VISION | {"num_hidden_layers": 2} | vision,
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=IMAGE,
    )
    return transformers.InternVLForConditionalGeneration(config).eval()


def idefics3():
    config = transformers.Idefics3Config(
        vision_config=VISION | {"num_hidden_layers": 2},
        text_config=TEXT | {"model_type": "llama", "pad_token_id": 0},
        image_token_id=IMAGE,
        scale_factor=1,
    )
    return transformers.Idefics3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("build", "projector"),
    [
        (paligemma, ["model.multi_modal_projector.linear"]),
        (internvl, [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]),
        (idefics3, ["model.connector.modality_projection.proj"]),
    ],
)
def test_other_families(build, projector):
    model, given = build(), llava_batch(images=(1, 1, 1))
    if build is idefics3:
        given["pixel_values"] = given["pixel_values"][:, None]
    assert llava_targets(model, "projector", "all-linear") == projector
    # Two layers with six each, and no pooling head, which PaliGemma does not look at.
    assert len(llava_targets(model, "vision", "all-linear")) == 12
    assert len(llava_targets(model, "language", "all-linear")) == 14
    parts = ["vision", "projector", "language"]
    base = model(**given).logits
    tokengate.patch(model, llava_targets(model, parts, "all-linear"))
    assert torch.equal(model(**given).logits, base)
    tokengate.verify(model, **given)
    with record_modalities(model) as rec:
        model(**given)
    reports = rec.reports()
    for name, module in rec.report().modules.items():
        if "vision" not in name and name not in projector:
            counts = [report.modules[name].positions for report in reports.values()]
            assert counts == [12, module.positions - 12]


def test_several_parts_at_once():
    model = llava()
    both = llava_targets(model, ["language", "vision"], ["q_proj", re.compile(r".*\.v_proj")])
    apart = [
        name
        for part in ("vision", "language")
        for name in llava_targets(model, part, ["q_proj", "v_proj"])
    ]
    assert both == apart
    everything = llava_targets(model, ("vision", "projector", "language"), "all-linear")
    # One of two vision layers, with six layers each; the language model has seven.
    assert len(everything) == 6 + 2 + 14
    assert not any("lm_head" in name for name in everything)
    tokengate.patch(model, everything)
    tokengate.verify(model, **llava_batch())


@pytest.mark.parametrize(
    ("selected", "used"), [(-2, 3), (-1, 4), (-3, 2), (2, 2), ([-2, -3], 3), ([1, -4], 1)]
)
@pytest.mark.parametrize("tower", ["CLIPVisionConfig", "SiglipVisionConfig"])
def test_vision_layers_without_a_gradient_are_left_out(selected, used, tower):
    strategy = "default" if tower == "CLIPVisionConfig" else "full"
    model = llava(
        4,
        getattr(transformers, tower),
        vision_feature_layer=selected,
        vision_feature_select_strategy=strategy,
    )
    found = llava_targets(model, "vision", ["q_proj", "fc1"])
    assert len(found) == 2 * used
    assert not any("head" in name for name in found)
    tokengate.patch(model, found)
    tokengate.verify(model, **llava_batch())
    tokengate.unpatch(model)
    # The next one, if there is one, would not be trained.
    if used < 4:
        further = f"*vision_tower*.layers.{used}.*.q_proj"
        with pytest.raises(tokengate.TokenGateError, match="would get no gradient: name others"):
            llava_targets(model, "vision", further)
        tokengate.patch(model, further)
        with pytest.raises(tokengate.TokenGateError, match="got no gradient"):
            tokengate.verify(model, **llava_batch())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_generate_with_images_is_the_same_with_and_without_cache(family):
    build, inputs = FAMILIES[family]
    model, given = build(), inputs("left")
    asked = [
        name
        for part, (targets, _) in ASKED[family.partition("2")[0]].items()
        for name in llava_targets(model, part, targets)
    ]
    plain = generate(model, given, True)
    tokengate.patch(model, asked, tau=0.05)
    away_from_initialisation(model, 0.5)
    outputs = [generate(model, given, cached).tolist() for cached in (True, False)]
    assert outputs[0] == outputs[1] != plain.tolist()
    assert len(outputs[0][0]) == given["input_ids"].shape[1] + 6


def generate(model, given, cached, **options):
    return model.generate(
        **given, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cached,
        pad_token_id=0, **options,
    )  # fmt: skip


def everywhere(model, kind="llava", tau=0.4):
    """`model` with layers of all parts patched, and some positions open and some closed."""
    names = [n for part, (t, _) in ASKED[kind].items() for n in llava_targets(model, part, t)]
    return away_from_initialisation(tokengate.patch(model, names, tau=tau), 0.075)


def check_that_they_add_up(reports, total):
    assert list(reports) == ["image", "text"]
    for name, module in total.modules.items():
        each = [report.modules[name] for report in reports.values() if name in report.modules]
        assert sum(m.positions for m in each) == module.positions > 0
        assert sum(m.modified for m in each) == module.modified
        assert len(each) == (2 if "language_model" in name else 1)
    counts = {g: sum(m.positions for m in r.modules.values()) for g, r in reports.items()}
    mean = sum(reports[g].token_sparsity * n for g, n in counts.items()) / sum(counts.values())
    assert mean == pytest.approx(total.token_sparsity)
    assert reports["image"].token_sparsity != pytest.approx(reports["text"].token_sparsity)
    assert 0 < reports["image"].token_sparsity < 1
    assert 0 < reports["text"].token_sparsity < 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_images_and_text_add_up(family, side):
    build, inputs = FAMILIES[family]
    model = everywhere(build(), family.partition("_")[0].rstrip("2345"))
    given = inputs(side)
    with (
        record_modalities(model) as rec,
        tokengate.record(model) as plain,
        tokengate.record(model, positions=True) as kept,
    ):
        model(**given)
    total, reports = plain.report(), rec.reports()
    assert rec.report().modules == total.modules
    check_that_they_add_up(reports, total)
    ids, real = given["input_ids"], given["attention_mask"].bool()
    images = (ids == IMAGE) | (ids == VIDEO)
    for name, module in total.modules.items():
        if "language_model" not in name:
            assert reports["image"].modules[name] == module
            continue
        assert module.positions == int(real.sum())
        (is_open,) = kept.positions[name]
        for group, wanted in (("image", images & real), ("text", ~images & real)):
            # Eq. 23 as a loop; the sample without an image is no sample of the images' report.
            samples = [s[w].tolist() for s, w in zip(is_open, wanted, strict=True) if w.any()]
            assert len(samples) == {"image": 2, "text": 3}[group]
            counted = reports[group].modules[name]
            assert counted.sparsity == pytest.approx(reference.sparsity(samples))
            assert counted.samples == len(samples)
            assert (counted.positions, counted.modified) == (
                sum(map(len, samples)),
                sum(map(sum, samples)),
            )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [True, False])
def test_in_generate_the_new_tokens_are_text(cached, side):
    model = everywhere(llava())
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = 0  # a new token that says it is an image would be counted so
        model.lm_head.bias = nn.Parameter(torch.zeros(64).index_fill(0, torch.tensor(IMAGE), -99.0))
    with record_modalities(model) as rec, tokengate.record(model) as plain:
        out = generate(model, llava_batch(side), cached)
    assert not (out[:, 13:] == IMAGE).any()
    check_that_they_add_up(rec.reports(), plain.report())
    # Six forwards: of everything and then of one token each, or of everything and what is new.
    images, words = 12, 12
    wanted = (
        (images, words + 3 * 5) if cached else (6 * images, 6 * words + 3 * (1 + 2 + 3 + 4 + 5))
    )
    for name in llava_targets(llava(), "language", ["q_proj", "v_proj"]):
        found = tuple(report.modules[name].positions for report in rec.reports().values())
        assert found == wanted


def test_restricted_to_a_modality():
    model, given = everywhere(llava(), tau=0.0), llava_batch("left")
    images = given["input_ids"] == IMAGE
    real = given["attention_mask"].bool()
    kept = {}
    for modality in ("image", "text"):
        with restrict_to(model, modality), tokengate.record(model, positions=True) as rec:
            model(**given)
        kept[modality] = rec.positions
    for name in kept["image"]:
        (of_images,), (of_text,) = kept["image"][name], kept["text"][name]
        if "language_model" in name:
            assert of_images[images & real].any()
            assert not of_images[~images].any()
            assert of_text[~images & real].any()
            assert not of_text[images].any()
        else:
            assert of_images.any()
            assert not of_text.any()
    # What is generated is text, and the cache is of what was restricted alike.
    with restrict_to(model, "text"):
        whole, cached = (generate(model, given, cached) for cached in (False, True))
    assert torch.equal(whole, cached)
    with one_sentence("restrict_to was asked for 'sound'", "'image' or 'text'"):
        restrict_to(model, "sound").__enter__()


def test_beams_and_the_inner_model():
    model, given = everywhere(llava()), llava_batch()
    with record_modalities(model) as rec, tokengate.record(model) as plain:
        generate(model, given, True, num_beams=2)
    check_that_they_add_up(rec.reports(), plain.report())
    with record_modalities(model) as whole:
        model(**given)
    with record_modalities(model) as inner:
        model.model(given["input_ids"], given["pixel_values"], given["attention_mask"])
    assert {g: r.to_dict() for g, r in inner.reports().items()} == {
        g: r.to_dict() for g, r in whole.reports().items()
    }


def test_a_batch_of_text_alone():
    model = everywhere(llava())
    model(**llava_batch())
    with record_modalities(model) as rec:
        model(**text_of(4, images=(0, 0, 0)))
    reports = rec.reports()
    language = llava_targets(llava(), "language", ["q_proj", "v_proj"])
    assert {
        n: m.positions for n, m in reports["text"].modules.items() if m.samples
    } == dict.fromkeys(language, 12)
    # What was not called at all is in both, as in any report.
    assert not set(language) & set(reports["image"].modules)
    assert "4 modules were never called" in str(reports["image"])


# transformers 5.24 gives the method another name, and keeps this one.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_counted_once(reentrant):
    model, given = everywhere(llava()), llava_batch()
    counts = []
    for checkpointed in (False, True):
        model.train(checkpointed)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with record_modalities(model) as rec:
            model(**given, use_cache=False).logits.sum().backward()
        counts.append({g: r.to_dict() for g, r in rec.reports().items()})
    assert counts[0] == counts[1]


def test_without_ids_there_is_an_error_and_nothing_is_left():
    model, given = everywhere(llava()), llava_batch()
    model(**given)
    hooks = {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()}
    before = snapshot(model)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(given["input_ids"]),
        "attention_mask": given["attention_mask"],
    }
    base = model(**embedded).logits
    for call in (
        lambda: model(**embedded),
        lambda: model.generate(**embedded, max_new_tokens=2),
        lambda: model.model.language_model(given["input_ids"]),
    ):
        with (
            record_modalities(model),
            pytest.raises(tokengate.TokenGateError, match="in a forward without input_ids, which"),
        ):
            call()
    assert torch.equal(model(**embedded).logits, base)
    left = {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()}
    assert (left, snapshot(model)) == (hooks, before)


def test_the_head_is_counted_where_it_sees_every_position():
    model, given = llava(), llava_batch()
    tokengate.patch(model, ["lm_head"], tau=0.1)
    with record_modalities(model) as rec:
        model(**given)
    # It receives no mask: the padding counts here as it does in tokengate.record.
    assert [r.modules["lm_head"].positions for r in rec.reports().values()] == [12, 3 * 13 - 12]
    with (
        record_modalities(model),
        pytest.raises(tokengate.TokenGateError, match=r"'lm_head' with positions of .* \(3, 1\)"),
    ):
        model(**given, logits_to_keep=1)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.language_model = nn.ModuleList([nn.Linear(2, 2)])
        self.resampler = nn.Linear(2, 2)
        self.config = type("Config", (), {"image_token_id": 1})()


REFUSALS = [
    (lambda m: llava_targets(m, "text", "q_proj"), "the part 'text': pass one or several of vis"),
    (lambda m: llava_targets(m, [], "q_proj"), "the part '': pass one or several"),
    (
        lambda m: llava_targets(nn.Linear(2, 2), "vision", "x"),
        "a Linear, which has no linear layer",
    ),
    (
        lambda m: llava_targets(Other(), "vision", "x"),
        "called vision_tower or visual or vision_mod",
    ),
    (
        lambda m: llava_targets(m, "projector", "q_proj"),
        "in the projector part of this Llava.*; the",
    ),
    (lambda m: llava_targets(m, "vision", "qproj"), r"nearest names are .*q_proj"),
    (
        lambda m: llava_targets(m, "vision", ["q_proj", "qkv"]),
        "target 'qkv' matches no linear layer",
    ),
    (lambda m: llava_targets(m, "vision", [""]), r"targets=\[''\] is not a list of names"),
    (lambda m: llava_targets(m, "vision", []), r"targets=\[\] matches no layer in the vision part"),
    (
        lambda m: llava_targets(m, ["projector", "vision"], "q_proj"),
        "matches no layer in the projector part .*: leave the part out, or add a target for it",
    ),
    (lambda m: record_modalities(m).__enter__(), "record was asked of .* without a patched layer"),
    (
        lambda m: record_modalities(tokengate.patch(nn.Linear(2, 2), "all-linear")).__enter__(),
        "a GatedLinear whose config has no image_token_id",
    ),
    (
        lambda m: record_modalities(tokengate.patch(Other(), "resampler")).__enter__(),
        "'resampler' is in none of vision, projector, language",
    ),
]


@pytest.mark.parametrize(("call", "says"), REFUSALS)
def test_refusals(call, says):
    model = llava()
    with pytest.raises(tokengate.TokenGateError, match=says) as error:
        call(model)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_restriction_to_one_modality():
    """The language model's layers at image tokens alone, and the tower's nowhere."""
    torch.manual_seed(0)
    model = llava()
    tokengate.patch(model, ["q_proj", "v_proj"], rank=2, gate=False)
    away_from_initialisation(model)
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 5, 6]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    images = ids == IMAGE
    where = {"*language_model*": images, "*": lambda name, shape: False}
    with tokengate.restrict(model, where), tokengate.record(model, positions=True) as rec:
        found = model(**inputs).logits
    for name, is_open in rec.positions.items():
        inside = images if "language_model" in name else torch.zeros_like(is_open[0])
        assert torch.equal(is_open[0], inside), name
    with tokengate.disabled(model):
        base = model(**inputs).logits
    assert torch.equal(found[:, :1], base[:, :1])
    assert not torch.equal(found[:, 1:], base[:, 1:])
