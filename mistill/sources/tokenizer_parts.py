"""Build ``tokenizer.json`` out of the parts that other formats keep a tokenizer in.

SentencePiece files and GGUF files list tokens with scores and types; ``tokenizer.json`` also
defines how text is split into words before tokens are merged. Byte-level vocabularies differ in
that, and a GGUF file only names the pre-tokenizer. An unknown name is refused, because a wrong
pre-tokenizer would give the model tokens that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from mistill.errors import VocabularyError

# Pre-tokenizers of byte-level vocabularies, by their names in llama.cpp's src/llama-vocab.cpp.
_GPT2 = ("gpt-2", "mpt", "olmo")
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Vocabularies that split by a regular expression before tokens are merged.
_EXPRESSIONS = {"smaug-bpe": _LLAMA3, "dbrx": _LLAMA3, "qwen2": _QWEN2}
# Vocabularies that look up a whole word before its tokens are merged.
_WHOLE_WORDS_FIRST = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _TEKKEN,
}

_SPACE = "\u2581"


class TokenType(IntEnum):
    """The type of a token, in the numbers of SentencePiece and of GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Pieces:
    """The pieces of a vocabulary, in the order of their ids.

    Attributes:
        texts: Text of each token.
        kinds: Type of each token.
        scores: SentencePiece score of each token; empty for byte-level vocabularies.
    """

    texts: Sequence[str]
    kinds: Sequence[TokenType]
    scores: Sequence[float] = ()


def byte_level_tokenizer(pieces: Pieces, merges: Sequence[str], cut: str, name: str) -> Tokenizer:
    """The tokenizer of a byte-level BPE vocabulary.

    Args:
        pieces: Tokens written in the stand-ins of GPT-2.
        merges: Pairs with a space between, best first.
        cut: llama.cpp's name for how text is cut into words.
        name: Name of the source, for the error.

    Returns:
        The tokenizer.

    Raises:
        VocabularyError: If ``cut`` is not a known name.
    """
    words = word_cutter(cut, name)
    tokenizer = Tokenizer(
        BPE(
            vocab={text: token for token, text in enumerate(pieces.texts)},
            merges=[_pair(merge) for merge in merges],
            ignore_merges=cut in _WHOLE_WORDS_FIRST,
        )
    )
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, pieces)
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def word_cutter(pre_tokenizer: str, name: str) -> PreTokenizer:
    """The pre-tokenizer that llama.cpp calls by a name.

    Args:
        pre_tokenizer: The name, as in ``tokenizer.ggml.pre``.
        name: Name of the source, for the error.

    Returns:
        A pre-tokenizer that splits text into words and maps bytes to printable characters.

    Raises:
        VocabularyError: If the name is not known.
    """
    if pre_tokenizer in _GPT2:
        return ByteLevel(add_prefix_space=False, use_regex=True)
    if pre_tokenizer in _DIGITS_THEN_GPT2:
        return PreTokenizers(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    expression = _WHOLE_WORDS_FIRST.get(pre_tokenizer) or _EXPRESSIONS.get(pre_tokenizer)
    if expression is not None:
        return PreTokenizers(
            [
                Split(Regex(expression), behavior="isolated"),
                ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = ", ".join(sorted((*_GPT2, *_DIGITS_THEN_GPT2, *_EXPRESSIONS, *_WHOLE_WORDS_FIRST)))
    raise VocabularyError(
        f"{name} splits text into words by the rule {pre_tokenizer!r}, which mistill does not "
        f"know; it knows {known}"
    )


def sentencepiece_tokenizer(
    pieces: Pieces, name: str, *, legacy: bool = True, space_prefix: bool = True
) -> Tokenizer:
    """The tokenizer of a SentencePiece BPE vocabulary with byte fallback.

    Args:
        pieces: Pieces with their scores.
        name: Name of the source, for the error.
        legacy: Whether a space is put before the text after every special token, as tokenizers
            of Llama 2 and Mistral v0.1 do; those that say ``legacy: false`` put one only before
            the first text.
        space_prefix: Whether a space is put before text at all.

    Returns:
        The tokenizer.

    Raises:
        VocabularyError: If the scores are those of a unigram vocabulary, or bytes are missing.
    """
    ranks = {
        text: rank
        for text, kind, rank in zip(pieces.texts, pieces.kinds, pieces.scores, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    if any(score != int(score) for score in ranks.values()):
        raise VocabularyError(
            f"{name} holds a unigram vocabulary; mistill reads the BPE vocabularies of Llama and "
            "Mistral models"
        )
    if sum(kind == TokenType.BYTE for kind in pieces.kinds) != 256:
        raise VocabularyError(f"{name} holds no tokens for single bytes, which mistill needs")
    unknown = next(
        (t for t, k in zip(pieces.texts, pieces.kinds, strict=True) if k == TokenType.UNKNOWN), None
    )
    tokenizer = Tokenizer(
        BPE(
            vocab={text: token for token, text in enumerate(pieces.texts)},
            merges=merges_of(ranks),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if space_prefix and not legacy:
        tokenizer.pre_tokenizer = Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend(_SPACE)] if space_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(tokenizer, pieces)
    return tokenizer


def merges_of(ranks: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies.

    SentencePiece joins the two neighbours whose union has the highest score, however it is cut;
    so every cut of a piece into two pieces is a merge, and it ranks as the piece does.

    Args:
        ranks: Piece to score, higher is earlier.

    Returns:
        Pairs, best first.
    """
    ranked_merges = []
    for token, score in ranks.items():
        for split in range(1, len(token)):
            left, right = token[:split], token[split:]
            if left in ranks and right in ranks:
                ranked_merges.append((-score, -ranks[left], -ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked_merges)]


def read_sentencepiece(file: Path) -> Pieces:
    """The pieces of a SentencePiece ``tokenizer.model``.

    Args:
        file: Path of the file.

    Returns:
        Pieces.

    Raises:
        VocabularyError: If it is not such a file.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.Load(str(file))
    except (RuntimeError, OSError) as error:
        raise VocabularyError(f"{file} is not a SentencePiece model, or is damaged") from error
    size = model.GetPieceSize()

    def kind(token: int) -> TokenType:
        tests = {
            TokenType.UNKNOWN: model.IsUnknown,
            TokenType.CONTROL: model.IsControl,
            TokenType.UNUSED: model.IsUnused,
            TokenType.BYTE: model.IsByte,
        }
        return next(
            (token_type for token_type, test in tests.items() if test(token)), TokenType.NORMAL
        )

    return Pieces(
        texts=[model.IdToPiece(token) for token in range(size)],
        kinds=[kind(token) for token in range(size)],
        scores=[model.GetScore(token) for token in range(size)],
    )


def begin_with(tokenizer: Tokenizer, token: str) -> None:
    """Make a tokenizer put a token before every text, as its model was trained.

    Args:
        tokenizer: Changed in place.
        token: A token of its vocabulary.
    """
    tokenizer.post_processor = TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", token, "$B"],
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )


def _add_tokens(tokenizer: Tokenizer, pieces: Pieces) -> None:
    """Keep control tokens and user-defined ones whole wherever they stand in a text."""
    by_kind: dict[bool, list[AddedToken]] = {True: [], False: []}
    for text, kind in zip(pieces.texts, pieces.kinds, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            special = kind != TokenType.USER_DEFINED
            by_kind[special].append(AddedToken(text, normalized=False, special=special))
    tokenizer.add_special_tokens(by_kind[True])
    tokenizer.add_tokens(by_kind[False])
