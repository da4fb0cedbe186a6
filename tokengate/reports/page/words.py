"""Which sub-words of a text make a word, as tokenizers mark them."""

from __future__ import annotations

from collections.abc import Sequence

# What begins a word: byte-level BPE's and SentencePiece's space, and one of a token decoded.
_BEGINS = ("\u0120", "\u2581", " ")
# WordPiece's mark of what goes on with one.
_GOES_ON = "##"
# As byte-level BPE writes space and newline: letters, which they are not.
_NO_LETTERS = "\u0120\u010a"


def words_of(tokens: Sequence[str]) -> list[int]:
    """The number of the word that each token belongs to, from 0 on, ascending.

    A token without a letter or digit, as punctuation and `[SEP]`'s like in brackets, is one of its
    own. Where no token has a mark, each is a word.
    """
    pieces = any(token.startswith(_GOES_ON) for token in tokens)
    spaced = not pieces and any(token.startswith(_BEGINS) for token in tokens)
    words: list[int] = []
    apart = True  # whether what comes next cannot go on
    for token in tokens:
        own = not any(map(str.isalnum, token.strip(_NO_LETTERS))) or _is_special(token)
        goes_on = token.startswith(_GOES_ON) if pieces else spaced and not token.startswith(_BEGINS)
        begins = not words or own or apart or not goes_on
        words.append((words[-1] + begins) if words else 0)
        # A lone mark of a space belongs to the word after it.
        apart = own and token not in _BEGINS
    return words


def numbered(words: Sequence[int | None]) -> list[int]:
    """The same from 0 on without gaps, where None is a word of its own."""
    numbers: list[int] = []
    for i, word in enumerate(words):
        begins = i > 0 and (word is None or word != words[i - 1])
        numbers.append((numbers[-1] + begins) if numbers else 0)
    return numbers


def _is_special(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in (("[", "]"), ("<", ">"))
