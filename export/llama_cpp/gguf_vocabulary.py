"""A tokenizer as a GGUF file describes it: tokens, merges or scores, and a pre-tokenizer's name.

llama.cpp has its own code for each way of splitting text into words before tokens are merged, and a
GGUF file names it. The name is found by splitting a text that distinguishes them. A tokenizer that
llama.cpp would follow differently is refused, because the model would get other tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from mistill.errors import VocabularyError
from mistill.folders.folder import read_json
from mistill.sources.tokenizer_parts import Pieces, TokenType, merges_of, word_cutter
from mistill.text.tokenizer_file import read_tokenizer
from mistill.text.vocabulary import Vocabulary

_log = logging.getLogger(__name__)

# llama.cpp's names of pre-tokenizers, and whether whole words are looked up before merging.
_CUTS = {
    "gpt-2": False,
    "smollm": False,
    "llama-bpe": True,
    "smaug-bpe": False,
    "qwen2": False,
    "tekken": True,
}
# What a flag of an added token makes a tokenizer do, beyond finding the token.
_MARKS = {
    "rstrip": "take the white space after them",
    "lstrip": "take the white space before them",
    "single_word": "are found as whole words only",
}
_NAMED_MARKS = 8
_PROBE = (
    "I'm sure we'LL see THEY'VE don't 'S x'd  two   spaces\tand\ttabs \n\nlines \r\n  \n"
    "1 12 123 1234 12345 3.14 v2.0b x86_64 \u0663\u0664\u0665 \u00bd\u2167 \u0967\u0968"
    "camelCase HTTPServer ABCdef \u00c9t\u00e9 na\u00efve \u1e9e\u00df \u4eca\u65e5\u306f "
    "\ud55c\uad6d\uc5b4 \u0928\u092e\u0938\u094d\u0924\u0947 e\u0301 a/b//c --- ...!?\n} ();"
    "\n\n\t#include <x> \U0001f600\U0001f468\u200d\U0001f469 $5 a_b @user 'quoted' \"x\"   \n  e  "
)


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer as a GGUF file describes it.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece.
        cut: llama.cpp's name of the pre-tokenizer; None for SentencePiece.
        pieces: One for each row of the embedding.
        merges: Pairs with a space between, best first; empty for SentencePiece.
        space_prefix: Whether a space is put before text; None for byte-level vocabularies.
    """

    model: str
    cut: str | None
    pieces: Pieces
    merges: tuple[str, ...] = ()
    space_prefix: bool | None = None


def read_gguf_vocabulary(folder: Path, vocabulary: Vocabulary) -> GgufVocabulary:
    """Describe the tokenizer of a folder as llama.cpp will follow it.

    Args:
        folder: A sound model folder.
        vocabulary: Vocabulary of the same folder.

    Returns:
        The description.

    Raises:
        VocabularyError: If llama.cpp would cut or merge text in another way.
    """
    file = folder / "tokenizer.json"
    definition = {**read_json(file), "added_tokens": vocabulary.added_tokens}
    model = definition.get("model") or {}
    if model.get("type") != "BPE":
        raise VocabularyError(
            f"{file} holds a {model.get('type')} vocabulary; export to GGUF needs a BPE vocabulary"
        )
    _warn_of_marks(definition, read_tokenizer(file).tokenizer.normalizer)
    merges = [_pair(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        scores = _scores(str(file), model["vocab"], definition, merges)
        pieces = _pieces(definition, vocabulary, model.get("unk_token"), scores)
        prefix = _space_prefix(definition, vocabulary)
        return GgufVocabulary("llama", None, pieces, space_prefix=prefix)
    if not merges:
        raise VocabularyError(
            f"{file} has no merges, and llama.cpp opens no such vocabulary; GGUF files need a "
            "BPE vocabulary with merges"
        )
    pieces = _pieces(definition, vocabulary, None, {})
    cut = _cut(file, definition)
    return GgufVocabulary("gpt2", cut, pieces, tuple(" ".join(pair) for pair in merges))


def _warn_of_marks(definition: Mapping[str, Any], normalizer: Normalizer | None) -> None:
    """Name the added tokens that llama.cpp finds in a text where the tokenizer does not."""
    marks: dict[str, list[str]] = {}
    for entry in definition.get("added_tokens") or []:
        content = entry["content"]
        for flag, words in _MARKS.items():
            if entry.get(flag):
                marks.setdefault(words, []).append(content)
        normal = content if normalizer is None else normalizer.normalize_str(content)
        if entry.get("normalized") and normal.strip("\u2581 ") != content.strip("\u2581 "):
            marks.setdefault("are looked for in normalized text", []).append(content)
    for words, contents in marks.items():
        examples = ", ".join(contents[:_NAMED_MARKS])
        more = len(contents) - _NAMED_MARKS
        _log.warning(
            "%d tokens %s, which llama.cpp does not do, so that conversations may be other tokens "
            "there: %s%s",
            len(contents),
            words,
            examples,
            f" and {more} more" if more > 0 else "",
        )


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _pieces(
    definition: Mapping[str, Any],
    vocabulary: Vocabulary,
    unknown: str | None,
    scores: Mapping[str, float],
) -> Pieces:
    """All rows of the embedding; those without a token get a placeholder as text."""
    byte_fallback = bool(scores)
    texts = [f"[PAD{row}]" for row in range(vocabulary.size)]
    kinds = [TokenType.UNUSED] * vocabulary.size
    for text, token in definition["model"]["vocab"].items():
        if token < vocabulary.size:
            is_byte = byte_fallback and len(text) == 6 and text.startswith("<0x")
            texts[token], kinds[token] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for entry in definition.get("added_tokens") or []:
        token = entry["id"]
        if token < vocabulary.size:
            texts[token] = entry["content"]
            kinds[token] = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
            if byte_fallback and entry["content"] == unknown:
                kinds[token] = TokenType.UNKNOWN
    ranks = [scores.get(text, 0.0) for text in texts] if byte_fallback else []
    return Pieces(texts, kinds, ranks)


# --- byte-level BPE -----------------------------------------------------------------------------


def _cut(file: Path, definition: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a byte-level vocabulary."""
    normalizer = definition.get("normalizer")
    # llama.cpp does not normalize; text is nearly always composed (NFC) already.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise VocabularyError(
            f"{file} normalizes text ({normalizer.get('type')}), which llama.cpp does not support"
        )
    tokenizer = read_tokenizer(file).tokenizer
    words_first = bool(definition["model"].get("ignore_merges"))
    if tokenizer.pre_tokenizer is not None:
        ours = _words(tokenizer.pre_tokenizer)
        for name, first in _CUTS.items():
            if first == words_first and _words(word_cutter(name, str(file))) == ours:
                return name
    raise VocabularyError(
        f"{file} splits text into words in a way that mistill knows no name of in llama.cpp; "
        f"it knows {', '.join(_CUTS)}"
    )


def _words(cutter: PreTokenizer) -> list[str]:
    return [word for word, _ in cutter.pre_tokenize_str(_PROBE)]


# --- SentencePiece ------------------------------------------------------------------------------


def _scores(
    name: str,
    vocabulary: Mapping[str, int],
    definition: Mapping[str, Any],
    merges: Sequence[tuple[str, str]],
) -> dict[str, float]:
    """The scores by which llama.cpp merges tokens as the tokenizer does.

    llama.cpp merges the two neighbours whose union has the highest score, however it is split. So
    all splits of a token must be merges, and be adjacent in the list.
    """
    joined: dict[str, float] = {}
    for left, right in merges:
        joined.setdefault(left + right, -float(len(joined)))
    added = {entry["content"] for entry in definition.get("added_tokens") or []}
    normal = {text for text in vocabulary if text not in added and not text.startswith("<0x")}
    within = [pair for pair in merges if "".join(pair) in normal]
    tied = _tied_runs(within)
    if tied:
        _log.warning(
            "this tokenizer merges %d runs of one character with one score; llama.cpp may split "
            "longer runs differently",
            len(tied) + 1,
        )
    joined |= {piece: joined[best] for piece, best in tied.items()}
    scores = dict(joined)
    for text in sorted(normal - joined.keys(), key=vocabulary.__getitem__):
        scores[text] = -float(len(scores))
    ranks = {text: scores[text] for text in normal}
    order = [joined["".join(pair)] for pair in within]
    if set(merges_of(ranks)) != set(within) or order != sorted(order, reverse=True):
        raise VocabularyError(
            f"{name} merges tokens in an order that no SentencePiece scores express, so that "
            "llama.cpp would split words differently"
        )
    return scores


def _tied_runs(merges: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Runs of one character that were joined with one score, and a run that has it.

    Mistral's vocabulary gives all runs of spaces the same score, so that their merges stand mixed.
    Of cuts with one score llama.cpp takes the leftmost, and a merge list the first in the list: the
    two differ on runs that are longer than the longest piece.
    """
    positions: dict[str, list[int]] = {}
    for position, pair in enumerate(merges):
        piece = "".join(pair)
        if piece == piece[0] * len(piece):
            positions.setdefault(piece, []).append(position)
    tied: dict[str, str] = {}
    # For each character, the run whose score later ones may share, and where its merges end.
    reached: dict[str, tuple[str, int]] = {}
    for piece, piece_positions in positions.items():
        best, end = reached.get(piece[0], (piece, -1))
        if piece_positions[0] < end:
            tied[piece] = best
            reached[piece[0]] = best, max(end, piece_positions[-1])
        else:
            reached[piece[0]] = piece, piece_positions[-1]
    return tied


def _space_prefix(definition: Mapping[str, Any], vocabulary: Vocabulary) -> bool:
    """Whether llama.cpp shall put a space before text and after every special token."""
    cutter = definition.get("pre_tokenizer") or {}
    if cutter.get("type") == "Metaspace":
        scheme = cutter.get("prepend_scheme", "always")
        if scheme != "first":
            return bool(scheme == "always")
        # A conversation begins with a special token, so that none of its texts is the first.
        plain = vocabulary.chat_template is None
        _log.warning(
            "this tokenizer puts a space before the first text only, which llama.cpp does not "
            "support: it will put one %s",
            "after every special token too" if plain else "nowhere, as in conversations",
        )
        return plain
    normalizer = definition.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps)
