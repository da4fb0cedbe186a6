"""Options by pattern: each layer finds one value, each pattern decides one layer."""

import re

import pytest
from models import Net, snapshot

import tokengate


def ranks(model):
    return {name: layer.modification.rank for name, layer in tokengate.layers(model).items()}


@pytest.mark.filterwarnings("ignore:the rank is above both:tokengate.errors.RankWarning")
def test_rank_and_scale_by_pattern():
    model = tokengate.patch(
        Net(),
        ["q_proj", "v_proj"],
        rank={"*.q_proj": 16, "*": 8},
        scale={"blocks.1.v_proj": 2.0, re.compile(r"blocks\.0\..*"): 1.0, "*": 0.25},
        dropout={"*": 0.1},
    )
    assert ranks(model) == {
        "blocks.0.q_proj": 16,
        "blocks.0.v_proj": 8,
        "blocks.1.q_proj": 16,
        "blocks.1.v_proj": 8,
    }
    scales = {n: layer.modification.scale for n, layer in tokengate.layers(model).items()}
    assert scales == {
        "blocks.0.q_proj": 1.0,
        "blocks.0.v_proj": 1.0,
        "blocks.1.q_proj": 0.25,
        "blocks.1.v_proj": 2.0,
    }


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
def test_every_method_takes_patterns(method):
    model = tokengate.patch(Net(), ["q_proj", "fc1"], method, rank={"q_proj": 4, "fc1": 6})
    assert ranks(model) == {
        "blocks.0.q_proj": 4,
        "blocks.0.fc1": 6,
        "blocks.1.q_proj": 4,
        "blocks.1.fc1": 6,
    }


@pytest.mark.filterwarnings("ignore:the rank is above both:tokengate.errors.RankWarning")
def test_all_others_may_be_none():
    model = tokengate.patch(Net(), ["q_proj"], rank={"*.q_proj": 16, "*": 8})
    assert set(ranks(model).values()) == {16}


def test_the_first_match_decides():
    model = tokengate.patch(Net(), ["q_proj"], rank={"blocks.0.*": 2, "*": 5})
    assert list(ranks(model).values()) == [2, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": {"v_proj": 4}}, "rank= has no pattern for the layer 'blocks.0.q_proj'"),
        ({"rank": {}}, "rank= has no pattern for the layer"),
        (
            {"rank": {"*": 8, "v_proj": 4}},
            "rank= never uses 'v_proj', because earlier patterns match the same layers",
        ),
        (
            {"scale": {"k_proj": 4, "*": 1.0}},
            "scale= names 'k_proj', which matches no targeted layer: correct it .* v_proj, q_proj",
        ),
        ({"rank": {"q_proj": 4, "v_proj": 0}}, "rank=0 is not a whole number"),
        ({"rank": {3: 4}}, "rank= has the key 3, which is no pattern"),
        ({"rnak": {"*": 4}}, "unknown option 'rnak'"),
    ],
)
def test_bad_patterns_leave_the_model_untouched(options, message):
    model = Net()
    before = snapshot(model)
    with pytest.raises(tokengate.TokenGateError, match=message) as error:
        tokengate.patch(model, ["q_proj", "v_proj"], **options)
    assert str(error.value).endswith(".")
    assert snapshot(model) == before
