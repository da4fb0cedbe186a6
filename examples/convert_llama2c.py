"""A checkpoint of llama2.c (version 0) and its tokenizer, as a folder for transformers.

    python examples/convert_llama2c.py stories260K.bin tok512.bin outputs/stories260K

Version 0 is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a
negative vocab_size says that the head is not the embedding), then the weights in float32, layer
within kind, and tables of RoPE, which transformers makes itself. llama2.c rotates neighbours,
(0, 1), (2, 3)...; transformers rotates halves, (0, d/2), (1, d/2 + 1)...: the rows of q and k are
put in that order. Attention does not mind, because both have it.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokengate import TokenGateError

HEADER = struct.Struct("<7i")
PIECE = struct.Struct("<fI")  # score and length of the bytes that follow
BOS, EOS = 1, 2
WHOLE = 3 + 256  # pieces before this are special or bytes, and no merge makes them


def model(path: Path) -> LlamaForCausalLM:
    """The checkpoint's model, in float32.

    Raises:
        TokenGateError: the file is not as long as its header says.
    """
    data = bytearray(path.read_bytes())
    if len(data) < HEADER.size:
        raise TokenGateError(
            f"{path} has {len(data)} bytes, and no llama2.c checkpoint has so few."
        )
    dim, hidden, layers, heads, kv_heads, vocab, positions = HEADER.unpack_from(data)
    tied, vocab = vocab > 0, abs(vocab)
    kv = dim // max(heads, 1) * kv_heads
    per_layer = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}
    for name, shape in per_layer.items():
        shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers)}
    shapes["model.norm.weight"] = (dim,)
    shapes["RoPE"] = (2, positions, dim // max(heads, 1) // 2)
    if not tied:
        shapes["lm_head.weight"] = (vocab, dim)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    if len(data) != HEADER.size + 4 * sum(sizes):
        raise TokenGateError(
            f"{path} has {len(data)} bytes, and a llama2.c checkpoint of version 0 with its header "
            f"would have {HEADER.size + 4 * sum(sizes)}: export it as version 0."
        )
    floats = torch.frombuffer(data, dtype=torch.float32, offset=HEADER.size).split(sizes)
    weights = {n: part.view(s) for (n, s), part in zip(shapes.items(), floats, strict=True)}
    del weights["RoPE"]
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weights[name] = halves(weight, dim // heads)
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, bos_token_id=BOS,
        eos_token_id=BOS,  # llama2.c's texts end where the next one begins
    )  # fmt: skip
    converted = LlamaForCausalLM(config).float().eval()
    converted.load_state_dict(weights)
    return converted


def halves(weight: Tensor, head: int) -> Tensor:
    """Rows `(heads * head, in)` of each head: the even ones first, then the odd ones."""
    return weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).reshape(weight.shape)


def pieces(path: Path) -> tuple[list[str], list[float]]:
    """Texts and scores of the tokens.

    Raises:
        TokenGateError: the file does not end where its last piece does.
    """
    data, at = path.read_bytes(), 4  # after the length of the longest piece
    texts, scores = [], []
    while at + PIECE.size <= len(data):
        score, length = PIECE.unpack_from(data, at)
        at += PIECE.size + length
        texts.append(data[at - length : at].decode(errors="replace"))
        scores.append(score)
    if at != len(data):
        raise TokenGateError(f"{path} is no llama2.c tokenizer: piece {len(texts)} is cut off.")
    return texts, scores


def tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """llama2.c's tokenizer: the pair of the highest score is merged first, the first from the left.

    It starts from a space and the text's characters, or their bytes where one is no piece. It
    agrees with llama2.c on every text in which the special tokens are not spelt out: "<s>" is one
    here. This supposes that every piece has a score of its own, as those of sentencepiece have.
    """
    texts, scores = pieces(path)
    texts[BOS], texts[EOS] = "<s>", "</s>"  # the file has them between line breaks
    known = {text: number for number, text in enumerate(texts)}
    merges = [
        (-scores[number], number, cut)
        for text, number in known.items()
        if number >= WHOLE
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    pairs = [(texts[number][:cut], texts[number][cut:]) for _, number, cut in sorted(merges)]
    backend = Tokenizer(models.BPE(known, pairs, unk_token=texts[0], byte_fallback=True))
    backend.normalizer = normalizers.Prepend(" ")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=texts[0], bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def main() -> None:
    """Convert both into one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    try:
        converted, words = model(args.checkpoint), tokenizer(args.tokenizer)
        if len(words) != converted.config.vocab_size:
            raise TokenGateError(
                f"{args.tokenizer} has {len(words)} pieces and {args.checkpoint} "
                f"{converted.config.vocab_size}: they are not of one model."
            )
    except (TokenGateError, FileNotFoundError) as why:
        raise SystemExit(str(why)) from why
    converted.save_pretrained(args.output)
    words.save_pretrained(args.output)
    print(f"{converted.num_parameters():,} parameters in {args.output}")


if __name__ == "__main__":
    main()
