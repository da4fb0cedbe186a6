"""A llama2.c checkpoint computes in transformers what llama2.c's equations say, on its tokens."""

import importlib.util
import struct
import sys

import numpy as np
import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st
from models import one_sentence
from places import RECIPES, SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS = SHARED / "weights"
real = pytest.mark.skipif(
    not WEIGHTS.exists(), reason="the real weights lie beside the project, not in it"
)


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("llama2c", RECIPES.parent / "convert_llama2c.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up(path, vocab=11):
    """A checkpoint with every kind of shape different, and weights that matter."""
    dim, hidden, layers, heads, kv_heads, positions = 24, 20, 2, 4, 2, 16
    kv = dim // heads * kv_heads
    layer = 2 * dim + 2 * dim * dim + 2 * kv * dim + 3 * hidden * dim
    tables = positions * dim // heads
    count = abs(vocab) * dim * (1 if vocab > 0 else 2) + layers * layer + dim + tables
    floats = np.random.default_rng(0).normal(0, 0.5, count).astype("<f4")
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocab, positions)
    path.write_bytes(header + floats.tobytes())
    return path


def longhand(path, tokens):
    """llama2.c's forward in float64: tokens (T,) -> logits (T, vocab)."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack("<7i", data[:28])
    floats = np.frombuffer(data, "<f4", offset=28).astype(np.float64)
    at = 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return floats[at - int(np.prod(shape)) : at].reshape(shape)

    size, tied, vocab = dim // heads, vocab > 0, abs(vocab)
    embedding = take(vocab, dim)
    att_norm = take(layers, dim)
    wq, wk = take(layers, dim, dim), take(layers, size * kv_heads, dim)
    wv, wo = take(layers, size * kv_heads, dim), take(layers, dim, dim)
    ffn_norm = take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    last_norm = take(dim)
    take(positions, size)
    head = embedding if tied else take(vocab, dim)
    assert at == len(floats)

    def norm(x, weight):
        return weight * x / np.sqrt((x**2).mean() + 1e-5)

    def rotate(x, place):
        x = x.copy()
        for i in range(0, len(x), 2):
            angle = place / 10000 ** ((i % size) / size)
            a, b = x[i], x[i + 1]
            x[i] = a * np.cos(angle) - b * np.sin(angle)
            x[i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return x

    keys, values = ([[] for _ in range(layers)] for _ in range(2))
    logits = []
    for place, token in enumerate(tokens):
        x = embedding[token].copy()
        for n in range(layers):
            y = norm(x, att_norm[n])
            q = rotate(wq[n] @ y, place)
            keys[n].append(rotate(wk[n] @ y, place))
            values[n].append(wv[n] @ y)
            out = np.zeros(dim)
            for h in range(heads):
                mine = slice(h * size, (h + 1) * size)
                shared = h // (heads // kv_heads)
                theirs = slice(shared * size, (shared + 1) * size)
                score = np.array([q[mine] @ k[theirs] for k in keys[n]]) / np.sqrt(size)
                share = np.exp(score - score.max())
                share /= share.sum()
                out[mine] = sum(p * v[theirs] for p, v in zip(share, values[n], strict=True))
            x += wo[n] @ out
            y = norm(x, ffn_norm[n])
            z = w1[n] @ y
            x += w2[n] @ (z / (1 + np.exp(-z)) * (w3[n] @ y))
        logits.append(head @ norm(x, last_norm))
    return np.array(logits)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("vocab", [11, -11])
def test_made_up_weights_give_the_logits_of_the_equations(convert, tmp_path, vocab, monkeypatch):
    path, tokens = made_up(tmp_path / "made_up.bin", vocab), [1, 4, 10, 0, 7, 7, 3]
    expected = longhand(path, tokens)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits_of(convert.model(path), tokens), expected, atol=1e-4)
    # With the rows as they stand in the file, every position but the first is another.
    monkeypatch.setattr(convert, "halves", lambda weight, head: weight)
    assert np.abs(logits_of(convert.model(path), tokens) - expected)[1:].max() > 1e-2


@real
def test_the_real_weights_give_the_logits_of_the_equations(convert):
    path, tokens = WEIGHTS / "stories260K.bin", [1, 403, 407, 261, 378, 13, 300, 511]
    expected = longhand(path, tokens)
    assert np.ptp(expected) > 10
    np.testing.assert_allclose(logits_of(convert.model(path), tokens), expected, atol=1e-4)


def test_a_checkpoint_that_is_not_what_its_header_says_is_refused(convert, tmp_path):
    path = made_up(tmp_path / "made_up.bin")
    whole = path.read_bytes()
    for data in (whole[:20], whole[:-4], whole + b"\0", b"ak42" + whole[4:]):
        path.write_bytes(data)
        with one_sentence(str(path), f"{len(data)} bytes"):
            convert.model(path)


def test_a_tokenizer_that_is_cut_off_is_refused(convert, tmp_path):
    path = tmp_path / "tok.bin"
    path.write_bytes(struct.pack("<ifI", 3, 0.0, 3) + b"ab")
    with one_sentence(str(path), "piece 1 is cut off"):
        convert.tokenizer(path)


@real
def test_both_must_be_of_one_model(convert, tmp_path, monkeypatch):
    checkpoint, output = made_up(tmp_path / "made_up.bin"), tmp_path / "out"
    arguments = ["convert", str(checkpoint), str(WEIGHTS / "tok512.bin"), str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"512 pieces and .* 11: they are not of one model"):
        convert.main()
    checkpoint.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"made_up.bin has 0 bytes, and no llama2.c checkpoint"):
        convert.main()
    assert not output.exists()


@pytest.fixture(scope="module")
def folder(convert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories260K")
    with pytest.MonkeyPatch.context() as patch:
        files = [str(WEIGHTS / name) for name in ("stories260K.bin", "tok512.bin")]
        patch.setattr(sys, "argv", ["convert", *files, str(folder)])
        convert.main()
    return folder


@real
def test_the_folder_tells_the_story_that_llama2c_documents(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = torch.tensor([tokenizer("").input_ids])
    assert start.tolist() == [[1]]
    told = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=40,
        pad_token_id=0,
    )  # fmt: skip
    assert tokenizer.decode(told[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
    )


def greedy(texts, scores, text):
    """llama2.c's encoding: always the pair whose piece has the highest score, from the left."""
    known = {piece: number for number, piece in enumerate(texts)}
    tokens = []
    for character in " " + text if text else "":
        whole = character in known
        tokens += [known[character]] if whole else [byte + 3 for byte in character.encode()]
    while True:
        best = None
        for at in range(len(tokens) - 1):
            piece = known.get(texts[tokens[at]] + texts[tokens[at + 1]])
            if piece is not None and (best is None or scores[piece] > scores[best[1]]):
                best = at, piece
        if best is None:
            return tokens
        tokens[best[0] : best[0] + 2] = [best[1]]


@real
def test_a_text_has_the_tokens_of_llama2c(convert, folder):
    texts, scores = convert.pieces(WEIGHTS / "tok512.bin")
    assert len(set(scores[259:])) == len(texts) - 259  # on which the agreement rests
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = st.sampled_from(
        ["Once upon a time", " ", "  ", "\n", "there was", "é", "日", "🙂", "▁"]
    )
    some = st.lists(words | st.text("abdehilnostuwy .,!\"'<0x>", max_size=12) | st.text(max_size=3))
    distinct = set()

    @settings(max_examples=many(200), deadline=None)
    @given(some.map("".join))
    def check(text):
        if any(special in text for special in ("<s>", "</s>", "<unk>")):
            return
        found = tokenizer(text).input_ids
        assert found == [1, *greedy(texts, scores, text)]
        assert tokenizer.decode(found, skip_special_tokens=True) == text
        distinct.update(found)

    check()
    assert len(distinct) > 100
    # Where they differ: what spells a special token is one.
    assert tokenizer("<s>").input_ids[-1] == 1 != greedy(texts, scores, "<s>")[-1]
