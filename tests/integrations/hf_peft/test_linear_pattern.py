"""Patterns of strangers mean what `re` says, and none of them takes long."""

import contextlib
import re
import time
import warnings

import pytest
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import one_sentence

from tokengate import TokenGateError
from tokengate.integrations.hf_peft.linear_pattern import LinearPattern, Work
from tokengate.integrations.hf_peft.names import FirstPattern, LayerIndex, ModulesToSave, Names

LETTERS = st.sampled_from([*"abA.1_", "\n", "é"])
CHARACTERS = st.sampled_from(
    ["a", "b", "A", r"\.", ".", r"\d", r"\w", r"\W", r"\S", "[ab]", "[^a.]", "[a-c1]", "é", "1"]
)
PLACES = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z"])


def _larger(inner):
    once = st.builds("(?:{})".format, inner)
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("({})".format, inner),
        st.builds(
            "{}{}".format,
            once,
            st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}?", "{2,}"]),
        ),
        st.builds("(?={}){}".format, inner, inner),
        st.builds("(?!{}){}".format, inner, inner),
        st.builds("{}(?<={})".format, inner, CHARACTERS),
        st.builds("{}(?<!{}b)".format, inner, CHARACTERS),
        st.builds("(?i:{})".format, inner),
        st.builds("(?s:{})".format, inner),
        st.builds("(?m:{})".format, inner),
    )


PATTERNS = st.recursive(CHARACTERS | PLACES, _larger, max_leaves=8)


@settings(max_examples=many(200))
@given(PATTERNS, st.lists(st.text(LETTERS, max_size=7), min_size=1, max_size=4))
def test_a_pattern_means_what_it_means_to_re(source, texts):
    expected, found = re.compile(source), LinearPattern(source, Work())
    for text in texts:
        assert found.fullmatch(text) == (expected.fullmatch(text) is not None), text
        assert found.match(text) == (expected.match(text) is not None), text


# As adapters have them: of PEFT's documentation, Unsloth, LLaMA-Factory, ms-swift and diffusers.
LEGITIMATE = [
    r".*\.(q_proj|v_proj)",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj).*",
    r"^(language_model|model\.language_model)(?=\.).*\.(q_proj|up_proj)",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"model\.layers\.(1[0-9]|[2-9])\..*_proj",
    r"(.*transformer_blocks\.\d+\.)?attn\d?\.to_(q|k|v|out\.0)",
    r"(?i).*Q_PROJ",
]
NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.12.mlp.up_proj", "q_proj", "lm_head",
    "model.visual.blocks.3.q_proj", "language_model.layers.2.self_attn.q_proj",
    "decoder.block.0.layer.1.EncDecAttention.q", "unet.transformer_blocks.7.attn1.to_out.0",
    "model.language_model.layers.1.mlp.up_proj", "amodel.layers.1.mlp.up_proj",
]  # fmt: skip


@pytest.mark.parametrize("source", LEGITIMATE)
def test_legitimate_patterns_keep_their_meaning(source):
    found = LinearPattern(source, Work())
    expected = [re.fullmatch(source, name) is not None for name in NAMES]
    assert any(expected)
    assert not all(expected)
    assert [found.fullmatch(name) for name in NAMES] == expected


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("(a+)+$", "a" * 1000 + "!"), (".*.*.*.*.*.*x", "a" * 1000), ("(a|aa)*b", "a" * 1000),
        ("(.*.*){50}x", "a" * 500), ("(?=(a+)+!)a*", "a" * 500), ("((a*)*)*b", "a" * 1000),
        ("(a?){50}a{50}", "a" * 49), (r"(\w+\s?)*!", "a" * 1000), ("(?:(?:a|b)*c?)*d", "ab" * 500),
    ],
)  # fmt: skip
def test_patterns_that_take_re_for_ever_take_no_time(source, text):
    began = time.process_time()
    assert not LinearPattern(source, Work()).fullmatch(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (r"(a)\1", ["GROUPREF"]),
        ("(a)?(?(1)b|c)", ["GROUPREF_EXISTS"]),
        ("a" * (1 << 19), ["too long"]),
        ("((a{1000}){1000}){1000}", ["too often", "a{1000}"]),
        ("(?:){65000}" * 100, ["takes longer"]),
        ("(" * 20_000 + ")" * 20_000, ["nested too deeply"]),
        ("a{99999999999}", ["too often"]),
    ],
    ids=range(7),
)
def test_what_is_not_known_or_too_large_is_one_sentence(source, words):
    with one_sentence(*words):
        LinearPattern(source, Work())


def test_work_is_counted_over_all_names():
    work = Work(20_000)
    pattern = LinearPattern(".*a.*", work)
    for _ in range(10):
        assert not pattern.fullmatch("b" * 100)
    numbers = range(1000)
    with pytest.raises(TokenGateError, match="takes longer"):
        any(pattern.fullmatch("b" * 100 + str(number)) for number in numbers)


KEYS = st.sampled_from(
    ["q", r"a\.q", "a.q", "^a.q", r"^b\.a\.q", "b.a.q", ".*q", "(a|b).q", "a", "..q", "a-q", "x.q",
     r"b.*\.q", "^q", "q|a", r"[ab]\.q"]
)  # fmt: skip


@given(
    st.dictionaries(KEYS, st.integers(), max_size=6),
    st.lists(st.sampled_from("abqx-"), min_size=1, max_size=4).map(".".join) | st.just("a-q"),
)
def test_the_first_key_that_matches_counts(patterns, name):
    expected = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    assert FirstPattern(patterns, Work()).of(name, "none") == next(expected, "none")


def test_thousands_of_keys_are_looked_up_and_not_tried():
    names = [f"model.layers.{i}.experts.{j}.up_proj" for i in range(40) for j in range(128)]
    work = Work()
    found = FirstPattern({name: i for i, name in enumerate(names)}, work)
    assert [found.of(name, None) for name in names] == list(range(len(names)))


@given(
    st.sampled_from(["layers", "h", "(?:layers|h)", r"m\.layers", "l.*s", r"\w+"]),
    st.lists(st.sampled_from(["layers", "h", "m", "1", "22", "x"]), min_size=1, max_size=6),
)
def test_the_number_behind_a_pattern_is_the_first(pattern, parts):
    name = ".".join(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
    numbers = re.findall(r"\.\d+(?=\.)", name)
    if pattern in ("l.*s", r"\w+") and len(numbers) > 1:  # it may match up to several of them
        with contextlib.suppress(TokenGateError):
            assert LayerIndex(pattern, Work()).of(name) == (expected and int(expected["idx"]))
    else:
        assert LayerIndex(pattern, Work()).of(name) == (expected and int(expected["idx"]))


def test_a_pattern_up_to_several_numbers_is_refused():
    with one_sentence("layers_pattern='.*'", "several numbers"):
        LayerIndex(".*", Work()).of("layers.1.experts.2.up")


@given(
    st.lists(st.sampled_from(["head", "h", "a.b", "(h|x)ead", "x"]), max_size=3),
    st.lists(st.sampled_from(["head", "a", "b", "xead", "h", "ahead"]), max_size=4).map(".".join),
)
def test_modules_to_save_are_matched_as_peft_does(modules, name):
    found = ModulesToSave(modules)
    assert found.would_hold(name) == any(
        re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules
    )
    assert found.are(name) == any(name.endswith(module) for module in modules)


def test_layers_to_transform():
    def targets(**config):
        names = Names({"target_modules": ["q", "layers.7.q"]} | config)
        return [
            name
            for name in ("layers.1.q", "layers.7.q", "q", "layers.2.v")
            if names.is_target(name)
        ]

    assert targets() == ["layers.1.q", "layers.7.q", "q"]
    assert targets(layers_to_transform=[]) == ["layers.1.q", "layers.7.q", "q"]
    # A name that is listed in full is not asked for its layer.
    assert targets(layers_to_transform=2, layers_pattern="layers") == ["layers.7.q", "q"]
    assert targets(layers_to_transform=[1], layers_pattern=["layers"]) == [
        "layers.1.q", "layers.7.q", "q",
    ]  # fmt: skip
    assert targets(layers_to_transform=[None], layers_pattern=["h"]) == ["layers.7.q", "q"]
