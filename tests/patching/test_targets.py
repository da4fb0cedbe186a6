"""What each kind of target means."""

import copy
import re
import warnings

import pytest
import torch
from models import Net
from torch import nn

import tokengate
from tokengate.errors import SkippedModuleWarning
from tokengate.patterns import FullName

ALL = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("q_proj", "v_proj", "fc1", "fc2")]


@pytest.mark.parametrize(
    ("targets", "options", "wanted"),
    [
        (["q_proj"], {}, ["blocks.0.q_proj", "blocks.1.q_proj"]),
        ("q_proj", {}, ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (["1.fc1", "head"], {}, ["blocks.1.fc1", "head"]),
        (["blocks.0.fc2"], {}, ["blocks.0.fc2"]),
        (["blocks.0.*"], {}, ALL[:4]),
        (["*_proj"], {}, [n for n in ALL if n.endswith("_proj")]),
        (["*.fc[12]"], {"exclude": ["0.fc1"]}, ["blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]),
        ([re.compile(r"blocks\.\d\.fc1")], {}, ["blocks.0.fc1", "blocks.1.fc1"]),
        (re.compile(r".*1\.fc1"), {}, ["blocks.1.fc1"]),
        (("fc1", "q_proj"), {"exclude": ["blocks.1.*"]}, ["blocks.0.q_proj", "blocks.0.fc1"]),
        ({"head"}, {}, ["head"]),
        ("all-linear", {}, [*ALL, "head"]),
        ("all-linear", {"train": ["head"]}, ALL),
        ("all-linear", {"exclude": ["blocks"]}, ["head"]),
        (["q_proj"], {"exclude": ["blocks.0"]}, ["blocks.1.q_proj"]),
        ("all-linear", {"exclude": lambda n, m: n.startswith("blocks")}, ["head"]),
        (lambda n, m: isinstance(m, nn.Linear) and m.out_features == 3, {}, ["head"]),
        (["0.fc1", "*"], {}, [*ALL, "head"]),
    ],
)
def test_targets(targets, options, wanted):
    model = tokengate.patch(Net(), targets, **options)
    assert list(tokengate.layers(model)) == wanted


def test_a_suffix_is_made_of_whole_components():
    model = nn.ModuleDict({"seq_proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2)})
    assert list(tokengate.layers(tokengate.patch(model, ["q_proj"]))) == ["q_proj"]


def test_a_regular_expression_must_match_in_full():
    with pytest.raises(tokengate.TokenGateError, match="matches no module"):
        tokengate.patch(Net(), [re.compile("q_proj")])


def test_of_mixed_matches_the_linear_layers_are_patched():
    model = nn.ModuleDict(
        {
            "a": nn.ModuleDict({"proj": nn.Conv1d(1, 1, 1)}),
            "b": nn.ModuleDict({"proj": nn.Linear(2, 2)}),
        }
    )
    with pytest.warns(SkippedModuleWarning, match=r"'proj' matches .*'a\.proj' \(Conv1d\)"):
        tokengate.patch(model, ["proj"])
    assert list(tokengate.layers(model)) == ["b.proj"]


class Vision(nn.Module):
    """Names that mean several kinds of modules, as a vision transformer's and an encoder's do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.ModuleDict({"proj": nn.Conv1d(3, 4, 2), "norm": nn.LayerNorm(4)})
        self.tokens = nn.ModuleDict({"embed": nn.Embedding(5, 4), "drop": nn.Dropout()})
        self.block = nn.ModuleDict({"proj": nn.Linear(4, 4), "embed": nn.Linear(4, 4)})
        self.block["norm"], self.block["drop"] = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fc = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        self.block["fc"] = nn.Linear(4, 4)
        self.block["same"] = nn.ModuleDict({"same": nn.Linear(4, 4)})
        self.rnn = nn.GRU(4, 4)


CONV, TABLE, RNN = "embed.proj", "tokens.embed", "rnn"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["proj"], [CONV]),
        (["embed"], ["embed", TABLE]),  # a container whose layers are not meant
        (["norm"], ["embed.norm"]),
        (["drop"], []),  # nothing to train in the other
        (["fc"], ["fc"]),  # which stands for the layer in it
        (["same"], []),  # a container of just the layer that is meant
        (["*.proj"], [CONV]),
        (["*"], [CONV, TABLE, RNN]),  # neither containers nor norms
        ([re.compile(r".*(proj|norm)")], [CONV]),
        (lambda n, m: n.endswith("proj"), [CONV]),
        (["block.proj", "block.embed"], []),
        ("all-linear", []),
    ],
)
def test_what_a_target_matches_beside_linear_layers_is_said(targets, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokengate.patch(model := Vision(), targets)
    assert tokengate.layers(model)
    found = [str(w.message) for w in caught if w.category is SkippedModuleWarning]
    assert len(found) == bool(said)
    if said:
        assert all(w.filename == __file__ for w in caught)
        assert re.findall(r"'([\w.]+)' \(\w+\)", found[0]) == sorted(said)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokengate.patch(Vision(), targets, exclude=[FullName(name) for name in said])


def test_what_was_patched_before_is_not_said():
    model = tokengate.patch(Vision(), ["block.proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokengate.patch(model, ["block.*"], exclude=["block.proj"])
    assert len(tokengate.layers(model)) == 6


def test_all_linear_leaves_a_language_models_head_out():
    model = Net()
    model.get_output_embeddings = lambda: model.head
    assert list(tokengate.layers(tokengate.patch(model, "all-linear"))) == ALL
    assert list(tokengate.layers(tokengate.patch(model, ["head"]))) == [*ALL, "head"]


def test_initial_values_do_not_depend_on_the_order_of_targets():
    def values(targets):
        torch.manual_seed(0)
        model = tokengate.patch(Net(), targets)
        return [layer.modification.A for layer in tokengate.layers(model).values()]

    first, second = values(["q_proj", "fc1"]), values(["fc1", "q_proj"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        (["head"], ["head.weight", "head.bias"]),
        ("head.bias", ["head.bias"]),
        (["norm"], [f"blocks.{i}.norm.{n}" for i in (0, 1) for n in ("weight", "bias")]),
        (["*.1.norm.bias"], ["blocks.1.norm.bias"]),
        ([re.compile(r".*\.0\.norm")], ["blocks.0.norm.weight", "blocks.0.norm.bias"]),
    ],
)
def test_train(train, wanted):
    model = tokengate.patch(Net(), ["q_proj"], train=train)
    own = {n for n, _ in Net().named_parameters()}
    assert [n for n, p in model.named_parameters() if p.requires_grad and n in own] == wanted


def test_what_cannot_be_trained():
    model = Net()
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(tokengate.TokenGateError, match=r"'codes', whose dtype torch.int8 cannot"):
        tokengate.patch(model, ["q_proj"], train=["codes"])
    assert list(tokengate.layers(tokengate.patch(model, ["q_proj"])))


def test_targets_may_be_any_iterable():
    model = tokengate.patch(Net(), (name for name in ["q_proj", "v_proj"]))
    assert len(tokengate.layers(model)) == 4


def test_a_linear_layer_that_cannot_be_patched_is_never_skipped_silently():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.ModuleDict()})
    model["b"]["out_proj"] = nn.Linear(4, 4)
    for targets in (["out_proj"], ["*"], lambda n, m: True):
        with pytest.raises(tokengate.TokenGateError, match=r"'a\.out_proj', whose owner 'a' is an"):
            tokengate.patch(model, targets)
    tokengate.patch(model, ["out_proj"], exclude=["a.*"])
    assert list(tokengate.layers(model)) == ["b.out_proj"]
    tokengate.unpatch(model)
    assert list(tokengate.layers(tokengate.patch(model, "all-linear"))) == ["b.out_proj"]


def test_train_knows_every_name_of_a_tied_weight():
    model = Net()
    model.alias = model.head
    tokengate.patch(model, ["q_proj"], train=["alias"])
    assert model.head.weight.requires_grad
    assert not model.blocks[0].norm.weight.requires_grad


def test_all_linear_stands_in_a_list_with_others():
    """As with what it leaves out: experts' parameters, convolutions, a language model's head."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2))

    def found(targets, **options):
        patched = tokengate.patch(copy.deepcopy(model), targets, rank=2, **options)
        return list(tokengate.layers(patched))

    assert found(["all-linear", "0"]) == ["0", "1", "2"]
    assert found(["all-linear", "0"], train=["2"]) == ["0", "1"]
    assert found(["all-linear", "0"], exclude=["1"]) == ["0", "2"]
    with pytest.raises(tokengate.TokenGateError, match="'2' is both a target and named by train="):
        found(["all-linear", "2"], train=["2"])
