"""What a checkpoint had no values for: named while it stays frozen, found, and compared."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tokengate
from tokengate import TokenGateError
from tokengate.errors import DifferentBaseWarning, FrozenHeadWarning
from tokengate.patching.heads import head, new_parameters

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

marked = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="transformers marks what it has loaded since its version 5",
)
LAYERS = ["query", "value", "intermediate.dense"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a language model, without a classifier or a pooler."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def classifier(folder, seed, **options):
    torch.manual_seed(seed)
    kind = transformers.BertForSequenceClassification
    return kind.from_pretrained(folder, num_labels=3, **options)


def rows():
    """Sentences of which the kind of their second word says the class."""
    ids = torch.randint(0, 32, (48, 4), generator=torch.Generator().manual_seed(1))
    return ids, ids[:, 1] % 3


def train(model):
    ids, labels = rows()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=2e-2, s=0.0))
    for _ in range(40):
        F.cross_entropy(model(ids).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return accuracy(model)


@torch.no_grad()
def accuracy(model):
    ids, labels = rows()
    return (model.eval()(ids).logits.argmax(-1) == labels).float().mean().item()


HEAD = [
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "classifier.weight",
    "classifier.bias",
]


@marked
def test_a_forgotten_head_is_named_and_found(bert, tmp_path):
    model = classifier(bert, 1)
    with pytest.warns(FrozenHeadWarning, match=r"classifier\.weight.*train=\"head\"") as caught:
        tokengate.patch(model, LAYERS, rank=8)
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in HEAD)
    assert caught[0].filename == __file__
    assert train(model) == 1.0  # around a head that nobody else has
    tokengate.save(model, tmp_path / "without")
    fresh = classifier(bert, 2)
    with pytest.warns(DifferentBaseWarning, match=r"classifier\.weight.*train=\"head\"") as caught:
        tokengate.load(fresh, tmp_path / "without")
    assert len(caught) == 1
    assert accuracy(fresh) < 0.6

    model = tokengate.patch(classifier(bert, 1), LAYERS, rank=8, train="head")  # and no warning
    assert train(model) == 1.0
    tokengate.save(model, tmp_path / "with")
    fresh = classifier(bert, 2)
    tokengate.load(fresh, tmp_path / "with")
    assert accuracy(fresh) == 1.0


@marked
def test_the_same_values_are_no_other_head(bert, tmp_path):
    model = classifier(bert, 1)
    with pytest.warns(FrozenHeadWarning):
        tokengate.patch(model, LAYERS)
    tokengate.save(model, tmp_path)
    tokengate.load(classifier(bert, 1), tmp_path)
    tokengate.load(classifier(bert, 1).to(torch.bfloat16), tmp_path)  # but for their rounding
    other = classifier(bert, 1)
    with torch.no_grad():
        other.classifier.bias[2] += 0.01
    with pytest.warns(DifferentBaseWarning, match=r"'classifier\.bias', which"):
        tokengate.load(other, tmp_path)
    with torch.no_grad():  # what of a 16-bit head is not its rounding
        other = classifier(bert, 1).to(torch.bfloat16)
        other.classifier.weight.mul_(1.1)
    with pytest.warns(DifferentBaseWarning, match=r"'classifier\.weight', which"):
        tokengate.load(other, tmp_path)


@marked
def test_marks_that_get_lost_are_remembered(bert, tmp_path):
    """As a copy has none, and what is sharded."""
    model = classifier(bert, 1)
    with pytest.warns(FrozenHeadWarning):
        tokengate.patch(model, LAYERS)
    copied = copy.deepcopy(model)
    assert not any(hasattr(p, "_is_hf_initialized") for p in copied.parameters())
    assert sorted(new_parameters(copied)) == sorted(HEAD)
    tokengate.save(copied, tmp_path)
    with pytest.warns(DifferentBaseWarning):
        tokengate.load(classifier(bert, 2), tmp_path)
    tokengate.unpatch(copied)
    assert new_parameters(copied) == {}
    # Without any mark, a head is known by its place, and compared all the same.
    plain = tokengate.patch(copy.deepcopy(classifier(bert, 1)), LAYERS)
    tokengate.save(plain, tmp_path)
    with pytest.warns(DifferentBaseWarning, match=r"'classifier\.weight', which"):
        tokengate.load(copy.deepcopy(classifier(bert, 2)), tmp_path)


@marked
def test_of_an_adapter_that_says_nothing_a_new_head_is_warned_of(bert, tmp_path):
    """As one of an earlier version, or of PEFT."""
    from tokengate.adapters.folder import read_adapter
    from tokengate.adapters.loading import load_saved

    tokengate.save(tokengate.patch(copy.deepcopy(classifier(bert, 1)), LAYERS), tmp_path)
    saved = read_adapter(tmp_path)
    assert saved.config.base_values
    saved.config.base_values.clear()
    with pytest.warns(DifferentBaseWarning, match=r"classifier"):
        load_saved(classifier(bert, 2), saved, "load")
    load_saved(copy.deepcopy(classifier(bert, 2)), saved, "load")


@marked
def test_a_patched_layer_that_is_new_is_warned_of(bert):
    model = classifier(bert, 1)
    with pytest.warns(FrozenHeadWarning, match=r"'classifier\.weight', 'classifier\.bias' of"):
        tokengate.patch(model, "all-linear", train="pooler")
    assert "classifier" in tokengate.layers(model)
    tokengate.unpatch(model)
    tokengate.patch(model, "all-linear", train="head")
    assert "classifier" not in tokengate.layers(model)
    assert sorted(
        n for n, p in model.named_parameters() if p.requires_grad and n in HEAD
    ) == sorted(HEAD)


@marked
def test_a_head_that_was_loaded_is_none(bert, tmp_path):
    classifier(bert, 1).save_pretrained(tmp_path)
    tokengate.patch(classifier(tmp_path, 2), LAYERS)
    masked = transformers.BertForMaskedLM.from_pretrained(bert)  # its decoder is the embedding
    tokengate.patch(masked, LAYERS)
    shown = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    with pytest.warns(FrozenHeadWarning, match=r"classifier\.weight"):
        tokengate.patch(shown, LAYERS)


@pytest.mark.parametrize("tied", [True, False])
def test_language_models_raise_no_alarm(tmp_path, tied):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    made = tokengate.patch(transformers.LlamaForCausalLM(config), ["q_proj"])  # all of it is new
    tokengate.unpatch(made).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokengate.patch(model, ["q_proj"])
    assert new_parameters(model) == {}
    assert list(head(model)) == ([] if tied else ["lm_head.weight"])
    if tied:
        with pytest.raises(TokenGateError, match="by name or by place"):
            tokengate.patch(model, ["k_proj"], train="head")


class Own(nn.Module):
    """What people put around a model of transformers."""

    def __init__(self, folder):
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.scorer = nn.Linear(32, 2)

    def forward(self, ids):
        return self.scorer(self.encoder(ids).last_hidden_state[:, 0])


@marked
def test_what_is_put_around_a_loaded_model_is_new(bert, tmp_path):
    torch.manual_seed(1)
    model = Own(bert)
    with pytest.warns(FrozenHeadWarning, match=r"'scorer\.weight', 'scorer\.bias' of this Own"):
        tokengate.patch(model, LAYERS)
    tokengate.unpatch(model)
    tokengate.patch(model, LAYERS, train=["head"])
    assert model.scorer.weight.requires_grad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokengate.unpatch(model)
        tokengate.patch(model, LAYERS)
        tokengate.save(model, tmp_path)
        tokengate.load(Own(bert), tmp_path)
    assert [each.category for each in caught] == [FrozenHeadWarning, DifferentBaseWarning]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("vit_tiny_patch16_224", ["head.weight", "head.bias"]),
        (
            "deit_tiny_distilled_patch16_224",
            ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"],
        ),
        ("mixer_s32_224", ["head.weight", "head.bias"]),
        ("convnext_atto", ["head.fc.weight", "head.fc.bias"]),
        ("resnet18", ["fc.weight", "fc.bias"]),
    ],
)
def test_heads_of_timm(name, names):
    timm = pytest.importorskip("timm", reason="the timm extra is not installed")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    assert list(head(model)) == names
    assert new_parameters(model) == {}


def test_heads_of_torchvision_and_open_clip():
    torchvision = pytest.importorskip("torchvision", reason="it comes with timm")
    open_clip = pytest.importorskip("open_clip", reason="the open_clip extra is not installed")
    with torch.device("meta"):
        vit, resnet = torchvision.models.vit_b_16(), torchvision.models.resnet18()
        vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
        text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
        clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    assert list(head(vit)) == ["heads.head.weight", "heads.head.bias"]
    assert list(head(resnet)) == ["fc.weight", "fc.bias"]
    assert list(head(clip)) == []


def test_a_module_of_that_name_is_meant_as_ever():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    tokengate.patch(model, ["body"], train="head")
    assert model["head"].weight.requires_grad
    with pytest.raises(TokenGateError, match="by name or by place"):
        tokengate.patch(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["0"], train="head")


@marked
@pytest.mark.filterwarnings("error::tokengate.errors.FrozenHeadWarning")
def test_what_is_quantised_after_it_was_loaded_is_not_new(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    tokengate.patch(model, ["q_proj"])
    assert len(tokengate.layers(model)) == 1
